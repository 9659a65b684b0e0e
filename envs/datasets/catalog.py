"""Which data sets there are: their targets, their sources, and those that are built here."""

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from etpo import EtpoError


class DatasetError(EtpoError):
    """A data set is absent, or cannot be read. One line that says what to do."""


class UnknownDataset(DatasetError, ValueError):
    """No data set has this name."""

    exit_code = 2


@dataclass(frozen=True)
class Recipe:
    """How a named table comes about.

    Attributes:
        target: the target's column.
        source: where the table comes from, in words.
        table: builds it, for one that needs no file; all others are CSV files in the data home.
        openml: the OpenML id that the file is fetched by, or None.
        kaggle: the Kaggle handle that the file is fetched by, or None: `owner/name`, or a competition's name.
        paper_share: share of the rows that `--protocol paper` keeps.
    """

    target: str
    source: str
    table: Callable[[], pd.DataFrame] | None = None
    openml: int | None = None
    kaggle: str | None = None
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


def _openml(number: int, target: str, paper_share: float = 1.0) -> Recipe:
    return Recipe(target, f"OpenML {number}", openml=number, paper_share=paper_share)


def _kaggle(handle: str, target: str) -> Recipe:
    kind = "Kaggle" if "/" in handle else "Kaggle competition"
    return Recipe(target, f"{kind} {handle}", kaggle=handle)


RECIPES = {
    "balance-scale": Recipe("class", "built exactly (OpenML 11)", table=balance_scale, paper_share=0.2),
    "tic-tac-toe": Recipe("Class", "built exactly (OpenML 50)", table=tic_tac_toe, paper_share=0.1),
    "breast-w": _openml(15, "Class", paper_share=0.1),
    "cmc": _openml(23, "Contraceptive_method_used"),
    "credit-g": _openml(31, "class"),
    "diabetes": _openml(37, "class"),
    "eucalyptus": _openml(188, "Utility"),
    "pc1": _openml(1068, "defects"),
    "airlines": _openml(1169, "Delay"),
    "jungle_chess_2pcs_raw_endgame_complete": _openml(41027, "class"),
    "pharyngitis": _kaggle("yoshifumimiya/pharyngitis", "radt"),
    "health-insurance": _kaggle("owaiskhan9654/health-insurance-lead-prediction-raw-data", "Response"),
    "kidney-stone": _kaggle("playground-series-s3e12", "target"),
    "spaceship-titanic": _kaggle("spaceship-titanic", "Transported"),
    "breast-cancer": _own("load_breast_cancer"),
    "wine": _own("load_wine"),
    "digits": _own("load_digits"),
    "diabetes-progression": _own("load_diabetes"),
}
SYNTHETIC = ":synthetic"


def dataset_names() -> list[str]:
    """The names that `load_dataset` knows; each also with `:synthetic` behind it."""
    return sorted(RECIPES)


def find_name(name: str) -> str:
    """The name as `RECIPES` spells it (`-` and `_` are alike). UnknownDataset offers the nearest name."""
    spelled = {known.replace("_", "-"): known for known in RECIPES}
    found = spelled.get(name.replace("_", "-"))
    if found is None:
        near = [known for known in RECIPES if name and name in known]
        near = near or difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.7)
        known = f"did you mean {near[0]}?" if near else "`etpo data list` names those that are known."
        raise UnknownDataset(f"unknown data set {name!r}; {known} (A file's name must end in .csv.)")
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of a named data set. UnknownDataset offers the nearest name."""
    return RECIPES[find_name(name)]
