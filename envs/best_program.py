"""Writes `best_program.py`: one file that shows the best program and scores it, with scikit-learn only."""

import inspect
import shlex

from etpo.envs import scoring
from etpo.envs.datasets import RECIPES, Dataset, prepare
from etpo.envs.prompts import as_program

_HEAD = '''\
"""The best program for the data set {name}: mean ROC AUC {auc_mean:.4f}, standard deviation {auc_std:.4f}.

    python best_program.py DATA.csv --target {target}

prepares the table (`etpo data save NAME --out DATA.csv` writes it) and scores the program on {n_splits}
random halvings, as in training. A language model wrote build_model, and nothing here keeps it in a sandbox:
read it before you run it.
"""

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import random
import re
import sys
import warnings

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

PAPER_PROTOCOL = {paper}
SHARE_OF_ROWS = {share}
SPLIT_SEEDS = {seeds}


'''

_MAIN = """

def main():
    parser = argparse.ArgumentParser(description="Score build_model on a table.")
    parser.add_argument("csv", metavar="DATA.csv", help="the table, with a header line")
    parser.add_argument("--target", required=True, help="the target's column")
    options = parser.parse_args()
    try:
        table = pd.read_csv(options.csv, low_memory=False)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read {options.csv}: {error}")
    if options.target not in table.columns:
        sys.exit(f"{options.csv} has no column {options.target!r}; it has {list(table.columns)}")
    table = complete_rows(table, SHARE_OF_ROWS)
    features = feature_columns(table, options.target)
    x, y, class_names = to_arrays(table, features, options.target, PAPER_PROTOCOL)
    warnings.simplefilter("ignore")
    aucs = []
    for seed in SPLIT_SEEDS:
        train, val = halves(len(y), seed)
        random.seed(seed)
        np.random.seed(seed)
        model = build_model(x[train], y[train])
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
    recipe = RECIPES.get(dataset.name)
    head = _HEAD.format(
        name=_in_docstring(dataset.name),
        auc_mean=auc_mean,
        auc_std=auc_std,
        target=_in_docstring(shlex.quote(dataset.target)),
        n_splits=len(scoring.SPLIT_SEEDS),
        paper=paper,
        share=recipe.paper_share if paper and recipe is not None else 1.0,
        seeds=scoring.SPLIT_SEEDS,
    )
    helpers = (
        prepare.complete_rows,
        prepare.feature_columns,
        prepare.to_arrays,
        prepare.is_number,
        prepare.encode,
        scoring.halves,
        scoring.spread_columns,
        scoring.roc_auc,
    )
    parts = [as_program(action).rstrip() + "\n", *(inspect.getsource(helper) for helper in helpers)]
    return head + "\n\n".join(parts) + _MAIN


def _in_docstring(text: str) -> str:
    """A name from a file, so that no quote or backslash in it ends the docstring that it stands in."""
    return text.replace("\\", r"\\").replace('"', r"\"")
