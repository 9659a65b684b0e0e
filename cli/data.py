"""`etpo data`: which data sets there are, and where."""

from pathlib import Path

import click

from etpo.cli.errors import Failed


@click.group()
def data() -> None:
    """List the data sets, find their files.

    Files are looked for in <data home>/<name>/*.csv; the data home is ETPO_DATA_HOME, else ~/.cache/etpo/data. Any
    CSV file can be used by its path, with --target.
    """


@data.command("list")
def list_() -> None:
    """List the data sets, with target, source and whether they are here."""
    from etpo.envs.datasets import RECIPES, DatasetError, dataset_names

    rows = [("name", "target", "here", "source")]
    for name in dataset_names():
        try:
            here = "built in" if RECIPES[name].table is not None else str(_file_of(name))
        except DatasetError:
            here = "no"
        rows.append((name, RECIPES[name].target, here, RECIPES[name].source))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        click.echo(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        )


@data.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the path of a data set's CSV file."""
    file = _file_of(name)
    if file is None:
        raise Failed(
            f"data set {name}: expected one that is a file, got one that is built in; use it by its name"
        )
    click.echo(file)


@data.command()
@click.argument("name")
def get(name: str) -> None:
    """Make sure that a data set is here, and say where it comes from."""
    from etpo.envs.datasets import RECIPES

    file = _file_of(name)
    recipe = RECIPES[name.replace("_", "-")]
    where = "built in, nothing to fetch" if file is None else str(file)
    click.echo(f"{name}: {where} ({recipe.source}; target {recipe.target})")


def _file_of(name: str) -> Path | None:
    """The CSV file of a data set, None where it is built in. UnknownDataset or DatasetError where there is none."""
    from etpo.envs import datasets

    name = name.replace("_", "-")
    recipe = datasets._recipe(name)
    return None if recipe.table is not None else datasets._file_at_home(name, recipe, None)
