"""Data sets and their preparation."""

import difflib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

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
    squares = itertools.product(("top", "middle", "bottom"), ("left", "middle", "right"))
    return pd.DataFrame(rows, columns=[*(f"{row}-{column}-square" for row, column in squares), "Class"])


def balance_scale() -> pd.DataFrame:
    """All 5⁴ balances: L, B or R as weight times distance is larger left, the same, or larger right.

    Columns and values as OpenML's table 11.
    """
    columns = ["left-weight", "left-distance", "right-weight", "right-distance"]
    table = pd.DataFrame(itertools.product(range(1, 6), repeat=4), columns=columns)
    torque = table.iloc[:, 0] * table.iloc[:, 1] - table.iloc[:, 2] * table.iloc[:, 3]
    return table.assign(**{"class": np.array(["B", "L", "R"])[np.sign(torque)]})


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
    "pharyngitis": Recipe("radt", "Kaggle yoshifumimiya/pharyngitis"),
    "health-insurance": Recipe("Response", "Kaggle owaiskhan9654/health-insurance-lead-prediction-raw-data"),
    "kidney-stone": Recipe("target", "Kaggle competition playground-series-s3e12"),
    "spaceship-titanic": Recipe("Transported", "Kaggle competition spaceship-titanic"),
}


def dataset_names() -> list[str]:
    """The names that `load_dataset` knows."""
    return sorted(RECIPES)


def load_dataset(
    name_or_csv: str, target: str | None = None, protocol: str = "default", data_home: Path | None = None
) -> Dataset:
    """Load and prepare a data set.

    Rows with a missing or infinite value are dropped, then the first 2,000 kept in file order; the identifier
    column is dropped (see `feature_columns`); text columns become the ranks of their sorted
    values; classes are sorted. With `protocol="paper"` every column of a table that holds any text becomes
    ranks, and some tables keep a seeded share of their rows.

    Args:
        name_or_csv: one of `dataset_names()` (`_` may stand for `-`), or the path of a CSV file.
        target: the target's column; required for a CSV file; a named data set has its own.
        protocol: `default` or `paper`.
        data_home: folder with `<name>/*.csv`; default `ETPO_DATA_HOME`, else `~/.cache/etpo/data`.

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: the file is absent or unreadable, lacks the target column, or its target has one class.
        ValueError: unknown protocol, or a CSV file without `target`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be default or paper, got {protocol!r}")
    if name_or_csv.lower().endswith(".csv") or os.sep in name_or_csv:
        path = Path(name_or_csv)
        if target is None:
            raise ValueError(f"{path}: a CSV file needs its target column; give --target COLUMN")
        recipe = Recipe(target, f"file {path.name}")
        table = read_csv(path)
        name = path.stem
    else:
        name = name_or_csv.replace("_", "-")
        recipe = find_recipe(name)
        table = read_csv(file_of(name, data_home)) if recipe.table is None else recipe.table()
        if target is not None:
            recipe = replace(recipe, target=target)
    return prepare(name, table, recipe, protocol)


def find_recipe(name: str) -> Recipe:
    """The recipe of a named data set (`_` may stand for `-`). UnknownDataset offers the nearest name."""
    recipe = RECIPES.get(name.replace("_", "-"))
    if recipe is None:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise UnknownDataset(
            f"unknown data set {name!r}; did you mean {near[0]}? (A file's name must end in .csv.)"
        )
    return recipe


def file_of(name: str, data_home: Path | None = None) -> Path:
    """The CSV file of a named data set: the only one in `<data home>/<name>` (`-` and `_` alike).

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: the folder or the file is absent, or there are several files.
    """
    recipe = find_recipe(name)
    if data_home is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        data_home = Path(os.environ.get("ETPO_DATA_HOME") or cache / "etpo" / "data").expanduser()
    name = name.replace("_", "-")
    for folder in (data_home / name, data_home / name.replace("-", "_")):
        files = sorted(folder.glob("*.csv"))
        if len(files) == 1:
            return files[0]
        if files:
            raise DatasetError(f"{folder} holds {len(files)} CSV files; keep only the table with the target")
    raise DatasetError(
        f"data set {name} is not here; get it from {recipe.source} and put its CSV file in {data_home / name}"
    )


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file; whatever goes wrong is one DatasetError line."""
    try:
        return pd.read_csv(path, low_memory=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DatasetError(
            f"cannot read {path} ({reason}); expected a CSV file with a header line"
        ) from error


def prepare(name: str, table: pd.DataFrame, recipe: Recipe, protocol: str) -> Dataset:
    """Turn a raw table into a Dataset; see `load_dataset`."""
    target = recipe.target
    if target not in table.columns:
        near = difflib.get_close_matches(target, list(map(str, table.columns)), n=1, cutoff=0.0)
        raise DatasetError(f"data set {name} has no column {target!r}; did you mean {near[0]!r}?")
    paper = protocol == "paper"
    table = complete_rows(table, recipe.paper_share if paper else 1.0)
    features = feature_columns(table, target)
    classes = table[target].nunique()
    if classes < 2 or not features:
        raise DatasetError(
            f"data set {name}: {len(table)} complete rows, {len(features)} features and {classes} values of "
            f"{target!r} are left; expected at least 1 feature and 2 values"
        )
    x, y, class_names = to_arrays(table, features, target, paper)
    return Dataset(name, x, y, tuple(map(str, features)), class_names, recipe.source, False, target, protocol)


def feature_columns(table: pd.DataFrame, target: str) -> list:
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
    table: pd.DataFrame, features: list, target: str, paper: bool
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
