"""Writes `best_program.py`: one file that shows the best program and scores it, with scikit-learn only."""

import ast
import inspect
import shlex
import types

from etpo.envs import scoring
from etpo.envs.datasets import RECIPES, Dataset, prepare, table
from etpo.envs.prompts import as_program

_HEAD = '''\
"""The best program for the data set {name}: mean ROC AUC {auc_mean:.4f}, standard deviation {auc_std:.4f}.

    python best_program.py DATA.csv --target {target}

prepares the table{how} and scores the program on {n_splits}
random halvings, as in training. A language model wrote PROGRAM, and nothing here keeps it in a sandbox: read
it before you run it.
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

PROGRAM = {program}

PAPER_PROTOCOL = {paper}
SHARE_OF_ROWS = {share}
SPLIT_SEEDS = {seeds}

import argparse
import contextlib
import random
import re
import sys
import types
import warnings

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score


'''

_READ_NAMED = """

def read(path, target):
    table = pd.read_csv(path, low_memory=False)
    if target not in table.columns:
        raise ValueError(f"expected a column {target!r}, got {list(table.columns)}")
    return complete_rows(table, SHARE_OF_ROWS)
"""

_READ_OWN = """

def read(path, target):
    table, notes = read_table(path, target, head=PAPER_PROTOCOL)
    for note in notes:
        print(note, file=sys.stderr)
    return table
"""

_MAIN = """

def load_program():
    \"\"\"The program as a module of its own, anew.\"\"\"
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(PROGRAM, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module


def main():
    parser = argparse.ArgumentParser(description="Score the program on a table.")
    parser.add_argument("csv", metavar="DATA.csv", help="the table, with a header line")
    parser.add_argument("--target", required=True, help="the target's column")
    options = parser.parse_args()
    target = options.target.strip()
    try:
        table = read(options.csv, target)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read {options.csv}: {error}")
    features = feature_columns(table, target)
    x, y, class_names = to_arrays(table, features, target, PAPER_PROTOCOL)
    warnings.simplefilter("ignore")
    aucs = []
    for seed in SPLIT_SEEDS:
        train, val = halves(len(y), seed)
        random.seed(seed)
        np.random.seed(seed)
        with contextlib.redirect_stdout(sys.stderr):
            model = load_program().build_model(x[train], y[train])
            proba = np.asarray(model.predict_proba(x[val]), dtype=np.float64)
        aucs.append(roc_auc(y[val], spread_columns(proba, np.unique(y[train]), len(class_names))))
    print(f"ROC AUC mean {np.mean(aucs)!s} std {np.std(aucs)!s}")


if __name__ == "__main__":
    main()
"""


def best_program(action: str, dataset: Dataset, auc_mean: float, auc_std: float) -> str:
    """The text of `best_program.py`: the program, the preparation, the scoring; needs scikit-learn only.

    Run on the same table it prints the scorer's numbers.

    Args:
        action: the body of `build_model`, or a program that defines it.
        dataset: what it was scored on.
        auc_mean, auc_std: its score, for the head of the file.
    """
    paper = dataset.protocol == "paper"
    recipe = None if dataset.is_own_file else RECIPES.get(dataset.name)
    head = _HEAD.format(
        name=_in_docstring(dataset.name),
        auc_mean=auc_mean,
        auc_std=auc_std,
        target=_in_docstring(shlex.quote(dataset.target)),
        how="" if dataset.is_own_file else " (`etpo data save NAME --out DATA.csv` writes it)",
        n_splits=len(scoring.SPLIT_SEEDS),
        program=_literal(as_program(action).rstrip() + "\n"),
        paper=paper,
        share=recipe.paper_share if paper and recipe is not None else 1.0,
        seeds=scoring.SPLIT_SEEDS,
    )
    helpers = (
        prepare.feature_columns,
        prepare.to_arrays,
        prepare.is_number,
        prepare.encode,
        scoring.halves,
        scoring.spread_columns,
        scoring.roc_auc,
    )
    if dataset.is_own_file:
        reading = [_code_of(table), _READ_OWN]
    else:
        reading = [inspect.getsource(prepare.complete_rows), _READ_NAMED]
    return head + "\n\n".join([*reading, *(inspect.getsource(helper) for helper in helpers)]) + _MAIN


def _code_of(module: types.ModuleType) -> str:
    """A module's text behind its docstring."""
    text = inspect.getsource(module)
    docstring = ast.parse(text).body[0]
    return "\n".join(text.split("\n")[docstring.end_lineno :])


def _literal(text: str) -> str:
    """A Python literal of a program: a string over several lines, where that says it exactly."""
    if "'''" in text or not all(c == "\n" or c.isprintable() for c in text):
        return repr(text)
    return ("r'''" if "\\" in text else "'''\\\n") + text + "'''"


def _in_docstring(text: str) -> str:
    """A name from a file, so that no quote or backslash in it ends the docstring that it stands in."""
    return text.replace("\\", r"\\").replace('"', r"\"")
