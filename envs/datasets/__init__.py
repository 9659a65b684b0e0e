"""Tables to write programs for: eighteen by name, and any CSV file. Imports nothing else of etpo."""

from etpo.envs.datasets.catalog import (
    RECIPES,
    DatasetError,
    Recipe,
    UnknownDataset,
    balance_scale,
    dataset_names,
    find_recipe,
    tic_tac_toe,
)
from etpo.envs.datasets.fetch import file_of
from etpo.envs.datasets.prepare import PROTOCOLS, Dataset, load_dataset, read_csv, recipe_of

__all__ = [
    "PROTOCOLS",
    "RECIPES",
    "Dataset",
    "DatasetError",
    "Recipe",
    "UnknownDataset",
    "balance_scale",
    "dataset_names",
    "file_of",
    "find_recipe",
    "load_dataset",
    "read_csv",
    "recipe_of",
    "tic_tac_toe",
]
