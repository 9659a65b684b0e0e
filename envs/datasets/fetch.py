"""Brings the file of a named data set into the data home."""

from pathlib import Path

from etpo.envs.datasets.catalog import SYNTHETIC, DatasetError, find_name, find_recipe
from etpo.envs.datasets.home import data_home, find_file, keep, scratch_folder


def file_of(name: str, home: Path | None = None) -> Path:
    """The CSV file of a named data set: from the data home, else fetched from its source and kept there.

    Args:
        name: of a data set that is a file (see `Recipe`).
        home: the data home; default `data_home()`.

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: one line that names the data set, its source, the folder to put the file in, and the
            synthetic twin.
    """
    return find_file(name, home) or fetch(name, home)


def fetch(name: str, home: Path | None = None) -> Path:
    """Fetch the file of a named data set from its source and keep it in the data home; see `file_of`."""
    name, home = find_name(name), home or data_home()
    recipe = find_recipe(name)
    assert recipe.openml is not None or recipe.kaggle is not None
    try:
        with scratch_folder(home) as scratch:
            if recipe.openml is not None:
                from etpo.envs.datasets.fetch_openml import fetch_openml

                return keep(fetch_openml(recipe.openml, scratch), name, recipe.source, home)
            from etpo.envs.datasets.fetch_kaggle import fetch_kaggle

            assert recipe.kaggle is not None
            return keep(fetch_kaggle(recipe.kaggle, recipe.target, scratch), name, recipe.source, home)
    except OSError as error:  # ConnectionError, or a data home that cannot be written
        reason = error.strerror or str(error)
        raise DatasetError(
            f"data set {name} is not here and could not be fetched from {recipe.source} ({reason}); put its "
            f"CSV file in {home / name}, or use {name}{SYNTHETIC}, a generated twin"
        ) from error
