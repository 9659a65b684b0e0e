"""Data sets and their preparation."""

import difflib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

MAX_ROWS = 2_000
PROTOCOLS = ("default", "paper")


class DatasetError(Exception):
    """A data set is absent, or cannot be read. One line that says what to do."""


class UnknownDataset(DatasetError, ValueError):
    """No data set has this name."""


@dataclass(frozen=True)
class Dataset:
    """A prepared table.

    Attributes:
        name: as given, without `.csv`.
        x: [rows, features] float64.
        y: [rows] int64, indices into `class_names`.
        feature_names: the columns of `x`.
        class_names: the target's values, sorted; also the order of probability columns.
        source: where the table came from, in words.
        synthetic: True for a generated twin, whose numbers say nothing about the real table.
        target: the target's column.
        protocol: `default` or `paper`.
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


@dataclass(frozen=True)
class Recipe:
    """How a named table comes about: `table` builds it, or None where it is a file in the data home."""

    target: str
    source: str
    identifier: str | None = None
    table: Callable[[], pd.DataFrame] | None = None
    paper_share: float = 1.0


def tic_tac_toe() -> pd.DataFrame:
    """All 958 boards on which a game can end, x having moved first; `positive` where x has three in a row.

    Columns and values as OpenML's table 50: x, o, b (blank) from the top left square to the bottom right one.
    """
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    rows = []
    for board in itertools.product("xob", repeat=9):
        x_wins, o_wins = (any(all(board[i] == who for i in line) for line in lines) for who in "xo")
        ahead = board.count("x") - board.count("o")
        if x_wins and o_wins:
            continue
        if (x_wins and ahead == 1) or (o_wins and ahead == 0):
            rows.append((*board, "positive" if x_wins else "negative"))
        elif not x_wins and not o_wins and ahead == 1 and "b" not in board:
            rows.append((*board, "negative"))
    columns = [f"{row}-{column}-square" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right")]
    return pd.DataFrame(rows, columns=[*columns, "Class"])


def balance_scale() -> pd.DataFrame:
    """All 5⁴ balances: L, B or R as weight times distance is larger left, equal, or larger right (OpenML 11)."""
    rows = []
    for left_w, left_d, right_w, right_d in itertools.product(range(1, 6), repeat=4):
        torque = left_w * left_d - right_w * right_d
        rows.append((left_w, left_d, right_w, right_d, "L" if torque > 0 else "R" if torque < 0 else "B"))
    return pd.DataFrame(rows, columns=["left-weight", "left-distance", "right-weight", "right-distance", "class"])


def _from_sklearn(loader: str) -> pd.DataFrame:
    from sklearn import datasets

    table = getattr(datasets, loader)(as_frame=True).frame
    if loader == "load_diabetes":
        table["target"] = (table["target"] > table["target"].median()).astype(int)
    return table


def _own(loader: str) -> Recipe:
    return Recipe("target", f"scikit-learn's {loader}", table=lambda: _from_sklearn(loader))


RECIPES = {
    "balance-scale": Recipe("class", "built exactly (OpenML 11)", table=balance_scale, paper_share=0.2),
    "tic-tac-toe": Recipe("Class", "built exactly (OpenML 50)", table=tic_tac_toe, paper_share=0.1),
    "breast-cancer": _own("load_breast_cancer"),
    "wine": _own("load_wine"),
    "digits": _own("load_digits"),
    "diabetes-progression": _own("load_diabetes"),
    "pharyngitis": Recipe("radt", "Kaggle yoshifumimiya/pharyngitis", identifier="number"),
    "health-insurance": Recipe(
        "Response", "Kaggle owaiskhan9654/health-insurance-lead-prediction-raw-data", identifier="ID"
    ),
    "kidney-stone": Recipe("target", "Kaggle competition playground-series-s3e12", identifier="id"),
    "spaceship-titanic": Recipe(
        "Transported", "Kaggle competition spaceship-titanic", identifier="PassengerId"
    ),
}


def dataset_names() -> list[str]:
    """The names that `load_dataset` knows."""
    return sorted(RECIPES)


def load_dataset(
    name_or_csv: str, target: str | None = None, protocol: str = "default", data_home: Path | None = None
) -> Dataset:
    """Load and prepare a data set.

    Rows with a missing value are dropped, then the first 2,000 kept in file order; the identifier column is
    dropped; text columns become the ranks of their sorted values; classes are sorted. With `protocol="paper"`
    every column of a table that holds any text becomes ranks, and some tables keep a seeded share of their rows.

    Args:
        name_or_csv: one of `dataset_names()` (`_` may stand for `-`), or the path of a CSV file.
        target: the target's column; required for a CSV file, refused for a name that has one.
        protocol: `default` or `paper`.
        data_home: folder with `<name>/*.csv`; default `ETPO_DATA_HOME`, else `~/.cache/etpo/data`.

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: the file is absent or unreadable, lacks the target column, or its target has one class.
        ValueError: unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be default or paper, got {protocol!r}")
    if name_or_csv.endswith(".csv") or os.sep in name_or_csv:
        path = Path(name_or_csv)
        if target is None:
            raise DatasetError(f"{path}: a CSV file needs its target column; give --target COLUMN")
        recipe = Recipe(target, f"file {path.name}")
        table = read_csv(path)
        name = path.stem
    else:
        name = name_or_csv.replace("_", "-")
        recipe = _recipe(name)
        if recipe.table is not None:
            table = recipe.table()
        else:
            table = read_csv(_file_at_home(name, recipe, data_home))
        if target is not None:
            recipe = Recipe(target, recipe.source, recipe.identifier, recipe.table, recipe.paper_share)
    return prepare(name, table, recipe, protocol)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise UnknownDataset(f"unknown data set {name!r}; did you mean {near[0]}? A file needs its path, ending in .csv")
    return RECIPES[name]


def _file_at_home(name: str, recipe: Recipe, data_home: Path | None) -> Path:
    if data_home is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        data_home = Path(os.environ.get("ETPO_DATA_HOME") or cache / "etpo" / "data")
    for folder in (data_home / name, data_home / name.replace("-", "_")):
        files = sorted(folder.glob("*.csv"))
        if len(files) == 1:
            return files[0]
        if files:
            raise DatasetError(f"{folder} holds {len(files)} CSV files, expected one; keep the training table only")
    raise DatasetError(
        f"data set {name} is not here: download it from {recipe.source} and put its CSV file in {data_home / name}"
    )


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file; whatever goes wrong is one DatasetError line."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"cannot read {path}: {reason}; expected a CSV file with a header line") from error


def prepare(name: str, table: pd.DataFrame, recipe: Recipe, protocol: str) -> Dataset:
    """Turn a raw table into a Dataset; see `load_dataset`."""
    if recipe.target not in table.columns:
        raise DatasetError(
            f"data set {name} has no column {recipe.target!r}; its columns: {', '.join(map(str, table.columns))}"
        )
    table = table.dropna().head(MAX_ROWS)
    if protocol == "paper" and recipe.paper_share < 1:
        rows = np.random.RandomState(0).permutation(len(table))[: round(recipe.paper_share * len(table))]  # noqa: NPY002
        table = table.iloc[np.sort(rows)]
    class_names, y = encode(table[recipe.target])
    if len(class_names) < 2:
        raise DatasetError(
            f"data set {name}: target {recipe.target!r} has {len(class_names)} classes in the "
            f"{len(table)} rows without missing values, expected at least 2"
        )
    any_text = any(not is_number(table[column]) for column in table.columns)
    features = [column for column in table.columns if column not in (recipe.target, recipe.identifier)]
    columns = []
    for column in features:
        ranks = not is_number(table[column]) or (protocol == "paper" and any_text)
        columns.append(encode(table[column])[1] if ranks else table[column].to_numpy(np.float64))
    x = np.column_stack(columns).astype(np.float64)
    return Dataset(
        name, x, y, tuple(map(str, features)), class_names, recipe.source, False, recipe.target, protocol
    )


def is_number(column: pd.Series) -> bool:
    """True for a column of numbers; truth values count as text."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def encode(column: pd.Series) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted distinct values as text, and for each row the index of its value: numbers by size, the rest as text."""
    values = column.to_numpy() if is_number(column) else column.astype(str).to_numpy(str)
    distinct, codes = np.unique(values, return_inverse=True)
    if distinct.dtype.kind == "f" and (distinct == np.round(distinct)).all():
        distinct = distinct.astype(np.int64)
    return tuple(str(value) for value in distinct), codes.astype(np.int64)
