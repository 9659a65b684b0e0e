"""`etpo data`: which data sets there are, and where."""

import click

from etpo.cli.errors import Failed


@click.group()
def data() -> None:
    """List the data sets, find their files.

    Files are looked for in <data home>/<name>/*.csv; the data home is ETPO_DATA_HOME, else
    ~/.cache/etpo/data. Any CSV file can be used by its path, with --target.
    """


@data.command("list")
def list_() -> None:
    """List the data sets, with target, source and whether they are here."""
    from etpo.envs.datasets import RECIPES, DatasetError, dataset_names, file_of

    rows = [("name", "target", "here", "source")]
    for name in dataset_names():
        recipe = RECIPES[name]
        try:
            here = "built in" if recipe.table is not None else str(file_of(name))
        except DatasetError:
            here = "no"
        rows.append((name, recipe.target, here, recipe.source))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*padded, row[3]]))


@data.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the path of a data set's CSV file."""
    from etpo.envs.datasets import file_of, find_recipe

    if find_recipe(name).table is not None:
        raise Failed(f"data set {name}: expected one that is a file, got one that is built in; use its name")
    click.echo(file_of(name))


@data.command()
@click.argument("name")
def get(name: str) -> None:
    """Make sure that a data set is here, and say where it comes from."""
    from etpo.envs.datasets import file_of, find_recipe

    recipe = find_recipe(name)
    where = "built in, nothing to fetch" if recipe.table is not None else str(file_of(name))
    click.echo(f"{name}: {where} ({recipe.source}; target {recipe.target})")
