"""The reward of a program: its mean ROC AUC over random halvings of the data, scored where the labels are."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from etpo.envs.datasets import Dataset, DatasetError
from etpo.envs.prompts import as_program, describe_error
from etpo.envs.sandbox import Sandbox, SplitArrays, refuse
from etpo.envs.sandbox.result import Failure, SplitResult

FAILURE_REWARD = -1.0
SPLIT_SEEDS = (0, 1, 2, 3, 4)
ROW_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Score:
    """What one program earned.

    Attributes:
        reward: `auc_mean`, or −1 where the program failed on any split.
        outcome: `ok`, `error`, `timeout`, `memory`, `refused`, `invalid_output` or `crashed`.
        auc_mean, auc_std: mean and population standard deviation over the splits; None unless `ok`.
        error: one line for the reflection prompt; None for `ok`.
        wall_s: seconds that the program's split processes took, added up.
        auc_splits: ROC AUC of each split, in the order of the seeds; None unless `ok`.
    """

    reward: float
    outcome: str
    auc_mean: float | None
    auc_std: float | None
    error: str | None
    wall_s: float
    auc_splits: tuple[float, ...] | None


@dataclass(frozen=True)
class Split:
    """One halving: what a child gets (`arrays`), and what stays here. `y_val` has the order of its x_val."""

    seed: int
    arrays: SplitArrays
    y_val: np.ndarray
    train_classes: np.ndarray


class Scorer:
    """Scores programs on one data set. Results are kept by the program's text.

    Programs run in parallel, splits one after another: what runs at the same time has the same labels, and so
    nothing to tell each other (one split's training half holds half of another's validation labels). A
    program that fails on a split is not run on the next.

    Split `seed` trains on the half that `train_test_split(test_size=0.5, random_state=seed)` gives: shuffled,
    not stratified.

    Args:
        dataset: what to score on.
        sandbox: where programs run; not closed by the scorer.
        split_seeds: one random halving each.
        timeout_s: wall-clock seconds for one split; default the sandbox's.

    Raises:
        DatasetError: a half of some split holds fewer than two classes.
        ValueError: no seeds.
    """

    def __init__(
        self,
        dataset: Dataset,
        sandbox: Sandbox,
        split_seeds: Iterable[int] = SPLIT_SEEDS,
        timeout_s: float | None = None,
    ) -> None:
        self.dataset = dataset
        self.sandbox = sandbox
        self.timeout_s = timeout_s
        self.splits = [make_split(dataset, seed) for seed in split_seeds]
        if not self.splits:
            raise ValueError("split_seeds must hold at least one seed, got none")
        self._kept: dict[str, Score] = {}

    def fresh(self, seeds: Iterable[int] = range(5, 25)) -> "Scorer":
        """A scorer on splits that training never saw, for `auc_fresh`."""
        return Scorer(self.dataset, self.sandbox, seeds, self.timeout_s)

    def score(self, action: str) -> Score:
        """Score one action: the body of `build_model`, or a program that defines it."""
        return self.score_many([action])[0]

    def score_many(self, actions: list[str]) -> list[Score]:
        """Score many actions, in parallel over the sandbox's workers; scores in the order of the actions."""
        try:
            self._run([action for action in dict.fromkeys(actions) if action not in self._kept])
        except BaseException:
            self.sandbox.cancel()
            raise
        return [self._kept[action] for action in actions]

    def _run(self, actions: list[str]) -> None:
        """Run actions that are not known yet, split after split, and keep their scores."""
        sources = {action: as_program(action) for action in actions}
        aucs: dict[str, list[float]] = {}
        wall_s = dict.fromkeys(actions, 0.0)

        def fail(action: str, failure: Failure, outcome: str) -> None:
            error = _one_line(failure, action, sources[action])
            self._kept[action] = failed(outcome, error, wall_s[action])
            aucs.pop(action, None)

        for action in actions:
            if (verdict := refuse(sources[action])) is not None:
                fail(action, verdict[1], verdict[0])
            else:
                aucs[action] = []
        for index, split in enumerate(self.splits):
            running = list(aucs)
            jobs = [(sources[action], split.arrays, split.seed) for action in running]
            for action, result in zip(running, self.sandbox.run(jobs, self.timeout_s), strict=True):
                wall_s[action] += result.wall_s
                failure, outcome = result.failure, result.outcome
                if failure is None:
                    auc, problem = self._auc(index, result)
                    if problem is None:
                        aucs[action].append(auc)
                        continue
                    failure, outcome = Failure("invalid output", problem), "invalid_output"
                fail(action, failure, outcome)
        for action, found in aucs.items():
            mean = float(np.mean(found))
            spread = float(np.std(found))
            self._kept[action] = Score(mean, "ok", mean, spread, None, wall_s[action], tuple(found))

    def _auc(self, index: int, result: SplitResult) -> tuple[float, str | None]:
        """ROC AUC of one split, or NaN and what is wrong with the probabilities."""
        split = self.splits[index]
        assert result.proba is not None
        classes = len(self.dataset.class_names)
        problem = check_proba(result.proba, len(split.y_val), classes, len(split.train_classes))
        if problem is not None:
            return float("nan"), problem
        proba = spread_columns(result.proba, split.train_classes, classes)
        return roc_auc(split.y_val, proba), None


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
    key = hashlib.sha256(dataset.y.tobytes() + seed.to_bytes(8, "little")).digest()
    val = np.random.default_rng(np.frombuffer(key, np.uint32)).permutation(val)
    y_train, y_val = dataset.y[train], dataset.y[val]
    for half, labels in (("training", y_train), ("validation", y_val)):
        if len(np.unique(labels)) < 2:
            raise DatasetError(
                f"data set {dataset.name}: the {half} half of split {seed} holds fewer than 2 classes; "
                "use more rows, or a target whose classes are less rare"
            )
    return Split(seed, SplitArrays(dataset.x[train], y_train, dataset.x[val]), y_val, np.unique(y_train))


def check_proba(proba: np.ndarray, rows: int, classes: int, train_classes: int) -> str | None:
    """What is wrong with predicted probabilities, in one line, or None.

    Columns may be as many as the data set has classes, or as the training half has.
    """
    if proba.shape[0] != rows or proba.shape[1] not in (classes, train_classes):
        return f"predict_proba returned shape {proba.shape}, expected ({rows}, {classes})"
    if not np.isfinite(proba).all():
        return "predict_proba returned NaN or infinite values"
    if (proba < -ROW_SUM_TOLERANCE).any() or (np.abs(proba.sum(axis=1) - 1) > ROW_SUM_TOLERANCE).any():
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


def failed(outcome: str, error: str, wall_s: float) -> Score:
    return Score(FAILURE_REWARD, outcome, None, None, error, wall_s, None)


def _one_line(failure: Failure, action: str, source: str) -> str:
    line = failure.line
    if line is not None and source != action:  # a bare body: the source has the signature before it
        line = max(1, line - 1)
    kind = type(failure.kind, (Exception,), {})
    return describe_error(kind(failure.message), line)
