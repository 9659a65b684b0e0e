"""Random halvings of a table, and the ROC AUC of probabilities on one of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from sklearn.metrics import roc_auc_score

from etpo.envs.datasets import Dataset, DatasetError
from etpo.envs.sandbox import SplitArrays

ROW_SUM_TOLERANCE = 1e-4
PERMUTATIONS_TRIED = 100


@dataclass(frozen=True)
class Split:
    """One halving: what a child gets (`arrays`), and what stays here.

    Attributes:
        seed: of `halves`, and what the program's random numbers start from.
        train, val: row numbers of the two halves, as the child gets them.
        y_val: labels of the validation half.
        train_classes: those that the training half holds.
    """

    seed: int
    arrays: SplitArrays
    train: np.ndarray
    val: np.ndarray
    y_val: np.ndarray
    train_classes: np.ndarray


def halves(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation: `train_test_split(test_size=0.5, random_state=seed)`."""
    order = np.random.RandomState(seed).permutation(rows)
    n_val = -(-rows // 2)
    return order[n_val:], order[:n_val]


def make_split(dataset: Dataset, seed: int) -> Split:
    """One halving of a data set. DatasetError where a half holds fewer than two classes.

    The validation rows are put in an order that only who has all labels can know: a program can compute the
    halves itself, and in a table that is sorted by class a row's number tells its label.
    """
    train, val = halves(len(dataset.y), seed)
    val = np.random.default_rng(secret(dataset.y, seed)).permutation(val)
    y_train, y_val = dataset.y[train], dataset.y[val]
    for half, labels in (("training", y_train), ("validation", y_val)):
        if len(np.unique(labels)) < 2:
            raise DatasetError(
                f"data set {dataset.name}: the {half} half of split {seed} holds fewer than 2 classes; "
                "use more rows, or a target whose classes are less rare"
            )
    arrays = SplitArrays(dataset.x[train], y_train, dataset.x[val])
    return Split(seed, arrays, train, val, y_val, np.unique(y_train))


def permuted_splits(splits: Sequence[Split], x: np.ndarray, y: np.ndarray, turns: int = 0) -> list[Split]:
    """The same halvings of the table whose labels were permuted once for all splits.

    Args:
        turns: classes are renamed after that: c becomes c + turns, modulo their number.
    """
    z = (_permuted(y, splits) + turns) % (int(y.max()) + 1)
    return [
        Split(
            split.seed, SplitArrays(x[split.train], z[split.train], x[split.val]), split.train, split.val,
            z[split.val], np.unique(z[split.train]),
        )
        for split in splits
    ]  # fmt: skip


def _permuted(y: np.ndarray, splits: Sequence[Split]) -> np.ndarray:
    """The labels in an order that only who has them all can know; two classes a half where possible."""
    draws = np.random.default_rng(secret(y, 2**32))
    for _ in range(PERMUTATIONS_TRIED):
        z = draws.permutation(y)
        if all(len(np.unique(z[half])) > 1 for split in splits for half in (split.train, split.val)):
            break
    return z


def secret(y: np.ndarray, purpose: int) -> np.ndarray:
    """Seeds that follow from all labels of a table, so that no program can know them."""
    return np.frombuffer(hashlib.sha256(y.tobytes() + purpose.to_bytes(8, "little")).digest(), np.uint32)


def check_proba(
    proba: np.ndarray, rows: int, classes: int, train_classes: int, precision: float = 0.0
) -> str | None:
    """What is wrong with predicted probabilities, in one line, or None.

    Columns may be as many as the data set has classes, or as the training half has.

    Args:
        precision: spacing at 1 of the numbers as they were returned; each may be off by as much.
    """
    if proba.shape[0] != rows or proba.shape[1] not in (classes, train_classes):
        return f"predict_proba returned shape {proba.shape}, expected ({rows}, {classes})"
    if not np.isfinite(proba).all():
        return "predict_proba returned NaN or infinite values"
    tolerance = max(ROW_SUM_TOLERANCE, precision * proba.shape[1])
    if (proba < -tolerance).any() or (np.abs(proba.sum(axis=1) - 1) > tolerance).any():
        return "predict_proba returned rows that are not probabilities summing to 1"
    return None


def spread_columns(proba: np.ndarray, train_classes: np.ndarray, classes: int) -> np.ndarray:
    """[rows, classes]: columns of classes that the training half lacks are filled in with zeros."""
    if proba.shape[1] == classes:
        return proba
    full = np.zeros((proba.shape[0], classes))
    full[:, train_classes] = proba
    return full


def roc_auc(y_val: np.ndarray, proba: np.ndarray) -> float:
    """ROC AUC; with several classes one-vs-one, the plain mean over pairs of classes that `y_val` holds.

    Args:
        y_val: [rows] int64, class indices.
        proba: [rows, classes] float64, rows sum to 1.
    """
    classes = proba.shape[1]
    if classes == 2:
        return float(roc_auc_score(y_val, proba[:, 1]))
    proba = proba / proba.sum(axis=1, keepdims=True)  # scikit-learn is stricter about the sum than we are
    return float(roc_auc_score(y_val, proba, multi_class="ovo", labels=np.arange(classes)))


def chance_spread(y_val: np.ndarray) -> float:
    """Standard deviation of the ROC AUC of a ranking that knows nothing; several classes: at most so much."""

    def of_pairs() -> Iterator[float]:
        for a, b in combinations(np.unique(y_val, return_counts=True)[1].tolist(), 2):
            yield ((a + b + 1) / (12 * a * b)) ** 0.5

    return float(np.mean([*of_pairs()] or [np.inf]))
