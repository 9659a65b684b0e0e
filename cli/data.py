"""`etpo data`: which data sets there are, where, and whether they are whole."""

from pathlib import Path

import click

from etpo.cli.errors import FAILED, Failed, Group, write_file


@click.group(cls=Group)
def data() -> None:
    """List the data sets, fetch and check their files.

    Files are looked for in <data home>/<name>/*.csv, and fetched into it; the data home is ETPO_DATA_HOME,
    else ~/.cache/etpo/data. Any CSV file can be used by its path, with --target. NAME:synthetic is a
    generated twin of any data set: same columns, types and class balance.
    """


@data.command("list")
def list_() -> None:
    """List the data sets, with target, source and whether they are here."""
    from etpo.envs.datasets import RECIPES, DatasetError, dataset_names
    from etpo.envs.datasets.home import find_file

    rows = [("name", "target", "here", "source")]
    for name in dataset_names():
        recipe = RECIPES[name]
        try:
            here = "built in" if recipe.table is not None else str(find_file(name) or "no")
        except DatasetError:
            here = "damaged"
        except OSError as error:
            here = f"unreadable ({error.strerror})"
        rows.append((name, recipe.target, here, recipe.source))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*padded, row[3]]))


@data.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the path of a data set's CSV file; nothing is fetched."""
    from etpo.envs.datasets import recipe_of
    from etpo.envs.datasets.home import data_home, find_file

    _, recipe = recipe_of(name)
    if recipe.table is not None:
        raise Failed(f"data set {name}: expected one that is a file, got one that is built in; use its name")
    file = find_file(name)
    if file is None:
        raise Failed(f"data set {name}: no file in {data_home()}; fetch it with `etpo data get {name}`")
    click.echo(file)


@data.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--again", is_flag=True, help="Fetch it even where it is here.")
def get(names: tuple[str, ...], again: bool) -> None:
    """Make sure that data sets are here, fetching what is not, and say where they lie.

    OpenML's come without an account. Kaggle's competitions (kidney-stone, spaceship-titanic) need your token
    in KAGGLE_API_TOKEN, and their rules accepted on their pages.
    """
    from etpo.envs.datasets import file_of, recipe_of
    from etpo.envs.datasets.fetch import fetch

    recipes = [recipe_of(name)[1] for name in names]
    for name, recipe in zip(names, recipes, strict=True):
        if recipe.table is not None:
            where = "built in, nothing to fetch"
        else:
            where = str(fetch(name) if again else file_of(name))
        click.echo(f"{name}: {where} ({recipe.source}; target {recipe.target})")


@data.command()
@click.argument("name")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The CSV file.")
def save(name: str, out: Path) -> None:
    """Write a data set's whole table as a CSV file; also one that is built in, or NAME:synthetic.

    It is what a run's best_program.py asks for.
    """
    from etpo.envs.datasets import file_of, read_csv, recipe_of

    name, recipe = recipe_of(name)
    table = read_csv(file_of(name)) if recipe.table is None else recipe.table()
    write_file("--out", out, table.to_csv(index=False))
    click.echo(f"{out}: {len(table)} rows; target {recipe.target} ({recipe.source})")


@data.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.pass_context
def check(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Check the data sets that are here: the file's checksum, and that it can be prepared.

    A file that etpo fetched has its checksum beside it, in a .json file; of others only the preparation is
    checked. Without NAME all are checked. The exit code is 1 where one does not hold.
    """
    from etpo.envs.datasets import dataset_names

    is_whole = [_check(name, named=bool(names)) for name in names or dataset_names()]
    if not all(is_whole):
        ctx.exit(FAILED)


def _check(name: str, *, named: bool) -> bool:
    """Print one data set's line; False where it does not hold, or is absent and was asked for by name."""
    from etpo.envs.datasets import DatasetError, load_dataset, recipe_of
    from etpo.envs.datasets.home import check_file, find_file

    _, recipe = recipe_of(name)
    try:
        file = find_file(name) if recipe.table is None else None
        if recipe.table is None and file is None:
            click.echo(f"{name}: not here")
            return not named
        table = load_dataset(name)
        if file is None:
            how = "built in"
        else:
            how = "checksum right" if check_file(file) else "no checksum recorded"
    except DatasetError as error:
        click.echo(f"{name}: {error}")
        return False
    classes = ", ".join(f"{label} {(table.y == i).sum()}" for i, label in enumerate(table.class_names))
    click.echo(f"{name}: {how}; {len(table.y)} rows, {table.x.shape[1]} features, classes {classes}")
    return True
