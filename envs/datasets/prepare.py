"""Data sets and their preparation."""

import difflib
import functools
import hashlib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from etpo.envs.datasets.catalog import (
    SYNTHETIC,
    DatasetError,
    Recipe,
    find_name,
    find_recipe,
)
from etpo.envs.datasets.fetch import file_of
from etpo.envs.datasets.table import read_table
from etpo.envs.datasets.twins import twin_recipe

PROTOCOLS = ("default", "paper")
CSV_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
MAX_CLASSES = 50  # one-vs-one goes over all pairs: 50 classes take a second a split, 200 a minute


@dataclass(frozen=True)
class Dataset:
    """A prepared table.

    Attributes:
        name: as given; of a file its name without `.csv`.
        x: [rows, features] float64.
        y: [rows] int64, indices into `class_names`.
        feature_names: the columns of `x`.
        class_names: the target's values, sorted; also the order of probability columns.
        source: where the table came from, in words.
        synthetic: True for a generated twin, whose numbers say nothing about the real table.
        target: the target's column.
        protocol: `default` or `paper`.
        is_own_file: True for a CSV file of the user's own, which is read by `read_table`.
        notes: what was dropped, drawn or guessed on the way, a line each.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    source: str
    synthetic: bool
    target: str = "target"
    protocol: str = "default"
    is_own_file: bool = False
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that a program is scored on: numbers, classes and names."""
        names = repr((self.feature_names, self.class_names, self.x.shape)).encode()
        return hashlib.sha256(names + self.x.tobytes() + self.y.tobytes()).hexdigest()


def load_dataset(
    name_or_csv: str, target: str | None = None, protocol: str = "default", data_home: Path | None = None
) -> Dataset:
    """Load and prepare a data set; a file that is not here yet is fetched from its source (see `file_of`).

    Rows with a missing or infinite value are dropped, then the first 2,000 kept in file order; the identifier
    column is dropped (see `feature_columns`); text columns become the ranks of their sorted
    values; classes are sorted. With `protocol="paper"` every column of a table that holds any text becomes
    ranks, and some tables keep a seeded share of their rows.

    A CSV file of the user's own is read by `read_table`: of more than 2,000 complete rows so many are drawn
    with a seed (the first ones with `protocol="paper"`). Its notes are logged as warnings, once each.

    Args:
        name_or_csv: one of `dataset_names()` (`_` may stand for `-`), such a name with `:synthetic` behind it
            for the generated twin (see `datasets_twins`), or the path of a CSV file.
        target: the target's column; required for a CSV file; a named data set has its own.
        protocol: `default` or `paper`.
        data_home: folder with `<name>/*.csv`; default `ETPO_DATA_HOME`, else `~/.cache/etpo/data`.

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: the file is absent and cannot be fetched, is not what was fetched, or is unreadable; it
            lacks the target column, or its target has one class or more than `MAX_CLASSES`.
        ValueError: unknown protocol, or a CSV file without `target`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be default or paper, got {protocol!r}")
    if name_or_csv.lower().endswith(CSV_ENDINGS) or os.sep in name_or_csv:
        path = Path(name_or_csv)
        if target is None:
            raise ValueError(f"{path}: a CSV file needs its target column; give --target COLUMN")
        return load_own_file(path, target, protocol)
    name, recipe = recipe_of(name_or_csv)
    table = read_csv(file_of(name, data_home)) if recipe.table is None else recipe.table()
    if target is not None:
        recipe = replace(recipe, target=target)
    return prepare(name, table, recipe, protocol)


def load_own_file(path: Path, target: str, protocol: str) -> Dataset:
    """Load and prepare a CSV file of the user's own; see `load_dataset`."""
    target = target.strip()
    try:
        table, notes = read_table(path, target, head=protocol == "paper")
    except OSError as error:
        raise DatasetError(f"{path}: expected a CSV file, got: {error.strerror or error}") from error
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    dataset = prepare(name, table, Recipe(target, f"file {path.name}"), protocol)
    left_out = [str(c) for c in table.columns if c != target and str(c) not in dataset.feature_names]
    notes += [f"identifier {column!r} left out" for column in left_out]
    dataset = replace(dataset, is_own_file=True, notes=tuple(notes))
    if notes:
        rows, features = dataset.x.shape
        _say(
            f"{path.name}: {'; '.join(notes)}; {rows} rows and {features} features used",
            f"{path}: {dataset.digest}",
        )
    return dataset


@functools.lru_cache(maxsize=64)
def _say(line: str, table: str) -> None:
    """Log a line, once for one table: a command loads it several times."""
    logging.getLogger(__name__).warning(line)


def recipe_of(name: str) -> tuple[str, Recipe]:
    """The name as it is spelled here, and its recipe; of NAME:synthetic the twin's.

    Raises:
        UnknownDataset: no data set has this name.
    """
    found = find_name(name.removesuffix(SYNTHETIC))
    if name.endswith(SYNTHETIC):
        return found + SYNTHETIC, twin_recipe(found)
    return found, find_recipe(found)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file; whatever goes wrong is one DatasetError line."""
    try:
        return pd.read_csv(path, low_memory=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DatasetError(
            f"cannot read {path} ({reason}); expected a CSV file in UTF-8 with a header line"
        ) from error


def prepare(name: str, table: pd.DataFrame, recipe: Recipe, protocol: str) -> Dataset:
    """Turn a raw table into a Dataset; see `load_dataset`."""
    target = recipe.target
    if target not in table.columns:
        near = difflib.get_close_matches(target, list(map(str, table.columns)), n=1, cutoff=0.0)
        raise DatasetError(f"data set {name} has no column {target!r}; did you mean {near[0]!r:.80}?")
    paper = protocol == "paper"
    table = complete_rows(table, recipe.paper_share if paper else 1.0)
    features = feature_columns(table, target)
    classes = table[target].nunique()
    if classes < 2 or not features:
        raise DatasetError(
            f"data set {name}: expected at least 1 feature and 2 values of {target!r}, got {len(features)} "
            f"and {classes} in {len(table)} complete rows"
        )
    if classes > MAX_CLASSES:
        raise DatasetError(
            f"data set {name}: expected a target with at most {MAX_CLASSES} classes, got {target!r} with "
            f"{classes} values in {len(table)} rows; cut it into classes, or choose another column"
        )
    x, y, class_names = to_arrays(table, features, target, paper)
    is_twin = name.endswith(SYNTHETIC)
    feature_names = tuple(map(str, features))
    return Dataset(name, x, y, feature_names, class_names, recipe.source, is_twin, target, protocol)


def feature_columns(table: pd.DataFrame, target: str) -> list[Any]:
    """All columns but the target and the identifier.

    The identifier is the first column that is named id, number or index, or like user_id or UserId, and whose
    values all differ.
    """
    names = r"(?i:id|number|index|unnamed: 0|.*[_ ]id)|.*[a-z](Id|ID)"
    others = [column for column in table.columns if column != target]
    for column in others:
        if re.fullmatch(names, str(column)) and table[column].is_unique:
            return [other for other in others if other != column]
    return others


def complete_rows(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """The first 2,000 rows without missing or infinite values; of these a share, drawn with seed 0."""
    table = table.replace([np.inf, -np.inf], np.nan).dropna().head(2_000)
    drawn = np.random.RandomState(0).permutation(len(table))[: round(share * len(table))]
    return table.iloc[np.sort(drawn)]


def to_arrays(
    table: pd.DataFrame, features: list[Any], target: str, paper: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """x [rows, features] float64, y [rows] int64, and the names of the classes, sorted.

    Text becomes ranks; with `paper`, in a table that holds any text, numbers do too.
    """
    rank_all = paper and not all(is_number(table[column]) for column in table.columns)
    columns = [
        encode(table[column])[1] if rank_all or not is_number(table[column]) else table[column].to_numpy()
        for column in features
    ]
    class_names, y = encode(table[target])
    return np.column_stack(columns).astype(np.float64), y, class_names


def is_number(column: pd.Series) -> bool:
    """True for a column of numbers; truth values count as text."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def encode(column: pd.Series) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct values, sorted (numbers by size, all else as text), and for each row its value's index."""
    values = column.to_numpy() if is_number(column) else column.astype(str).to_numpy(str)
    distinct, codes = np.unique(values, return_inverse=True)
    if distinct.dtype.kind == "f" and (distinct == np.round(distinct)).all():
        distinct = distinct.astype(np.int64)
    return tuple(str(value) for value in distinct), codes.astype(np.int64)
