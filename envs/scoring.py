"""The reward of a program: its mean ROC AUC over random halvings of the data, scored where the labels are."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from etpo.envs.audit import Auditor
from etpo.envs.datasets import Dataset
from etpo.envs.pacing import Pace
from etpo.envs.prompts import as_program, describe_failure
from etpo.envs.runner import Runner
from etpo.envs.sandbox import refuse
from etpo.envs.sandbox.result import Failure, SplitResult
from etpo.envs.splits import (
    Split,
    check_proba,
    halves,
    make_split,
    roc_auc,
    secret,
    spread_columns,
)

__all__ = [
    "FAILURE_REWARD", "SPLIT_SEEDS", "Score", "Scorer", "check_proba", "failed", "halves", "make_split",
    "roc_auc", "spread_columns",
]  # fmt: skip

FAILURE_REWARD = -1.0
SPLIT_SEEDS = (0, 1, 2, 3, 4)
DISHONEST = "dishonest"
# Outcomes whose message is the program's own, and so could carry labels.
_SPEAKING = ("error", "invalid_output", "refused")


@dataclass(frozen=True)
class Score:
    """What one program earned.

    Attributes:
        reward: `auc_mean`, or −1 where the program failed on any split.
        outcome: `ok`, `error`, `timeout`, `memory`, `refused`, `invalid_output`, `crashed` or `dishonest`.
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


class Scorer:
    """Scores programs on one data set. Results are kept by the program's text, but for time-outs.

    Programs run in parallel, splits one after another: what runs at the same time has the same labels, and so
    nothing to tell each other (one split's training half holds half of another's validation labels). A
    program that fails on a split is not run on the next. What is told of a failure comes from a run of the
    same split on permuted labels, so that no message carries labels on. A time-out is tried once more, alone.

    Split `seed` trains on the half that `train_test_split(test_size=0.5, random_state=seed)` gives: shuffled,
    not stratified.

    Args:
        dataset: what to score on.
        sandbox: where programs run, a `Sandbox` or another `Runner`; not closed by the scorer.
        split_seeds: one random halving each.
        timeout_s: processor seconds for one split; default the sandbox's.
        audit_share: share of the programs that are audited (see `audit`), besides every new best one;
            0: none is.

    Raises:
        DatasetError: a half of some split holds fewer than two classes.
        ValueError: no seeds, or no share.
    """

    def __init__(
        self,
        dataset: Dataset,
        sandbox: Runner,
        split_seeds: Iterable[int] = SPLIT_SEEDS,
        timeout_s: float | None = None,
        audit_share: float = 0.0,
    ) -> None:
        if not 0.0 <= audit_share <= 1.0:
            raise ValueError(f"audit_share must be 0 to 1, got {audit_share}")
        self.dataset = dataset
        self.sandbox = sandbox
        self.timeout_s = timeout_s
        self.audit_share = audit_share
        self.splits = [make_split(dataset, seed) for seed in split_seeds]
        if not self.splits:
            raise ValueError("split_seeds must hold at least one seed, got none")
        self._auditor = Auditor(self._rounds, self.splits, dataset.x, dataset.y)
        self._pace = Pace(sandbox.workers)
        self._best = -np.inf
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
            new = self._run([action for action in dict.fromkeys(actions) if action not in self._kept])
        except BaseException:
            self.sandbox.cancel()
            raise
        self._kept |= {action: score for action, score in new.items() if score.outcome != "timeout"}
        known = self._kept | new
        return [known[action] for action in actions]

    def judge_many(self, attempts: Sequence[tuple[object, str]]) -> list[Score]:
        """`score_many`, as a judge of `Coding`: there is one task, the table."""
        return self.score_many([action for _, action in attempts])

    def _run(self, actions: list[str]) -> dict[str, Score]:
        """Scores of actions that are not known yet."""
        sources = {action: as_program(action) for action in actions}
        scores: dict[str, Score] = {}
        for action, source in list(sources.items()):
            if (verdict := refuse(source)) is not None:
                outcome, failure = verdict
                scores[action] = failed(outcome, _one_line(failure, action, source), 0.0)
                del sources[action]
        results = self._rounds(sources, self.splits)
        told = self._failures_to_tell(sources, results)
        for action, runs in results.items():
            wall_s = sum(run.wall_s for run in runs)
            if action in told:
                error = _one_line(told[action], action, sources[action])
                scores[action] = failed(runs[-1].outcome, error, wall_s)
            else:
                aucs = tuple(map(self._auc, self.splits, runs))
                mean = float(np.mean(aucs))
                scores[action] = Score(mean, "ok", mean, float(np.std(aucs)), None, wall_s, aucs)
        if self.audit_share > 0:
            self._audit(scores, sources, results)
        return scores

    def _rounds(self, sources: Mapping[str, str], splits: Sequence[Split]) -> dict[str, list[SplitResult]]:
        """Results of each program on one split after another, up to its first failure."""
        results: dict[str, list[SplitResult]] = {name: [] for name in sources}
        running = list(sources)
        for index, split in enumerate(splits):
            if not running:
                break
            if index == 0:
                self._pace.start(len(running))
            else:
                self._pace.next_round(len(running))
            for name, result in self._run_jobs({name: (sources[name], split) for name in running}).items():
                results[name].append(result)
            running = [name for name in running if results[name][-1].failure is None]
        return results

    def _run_jobs(self, jobs: Mapping[str, tuple[str, Split]]) -> dict[str, SplitResult]:
        """Results of (source, split) by name, all run at once; a time-out is tried once more, alone."""
        asked = [(source, split.arrays, split.seed) for source, split in jobs.values()]
        found = dict(zip(jobs, self.sandbox.run(asked, self.timeout_s), strict=True))
        for name, again in zip(jobs, asked, strict=True):
            if found[name].outcome == "timeout":  # neighbours may have slowed it down
                (found[name],) = self.sandbox.run([again], self.timeout_s)
        return {name: self._checked(jobs[name][1], result) for name, result in found.items()}

    def _checked(self, split: Split, result: SplitResult) -> SplitResult:
        """The result, or `invalid_output` where its probabilities are none."""
        if result.proba is None:
            return result
        classes = len(self.dataset.class_names)
        sizes = len(split.y_val), classes, len(split.train_classes)
        problem = check_proba(result.proba, *sizes, result.precision)
        if problem is None:
            return result
        failure = Failure("invalid output", problem)
        return replace(result, outcome="invalid_output", proba=None, failure=failure)

    def _auc(self, split: Split, result: SplitResult) -> float:
        assert result.proba is not None
        proba = spread_columns(result.proba, split.train_classes, len(self.dataset.class_names))
        return roc_auc(split.y_val, proba)

    def _failures_to_tell(
        self, sources: Mapping[str, str], results: Mapping[str, list[SplitResult]]
    ) -> dict[str, Failure]:
        """What may be told of each program that failed: nothing that depends on the true labels.

        A message of the program's own is that of the same split on permuted labels; there, what is true of
        the program itself is true as well. All are run at once: no true label is near.
        """
        failed_on = {name: (len(runs) - 1, runs[-1]) for name, runs in results.items() if runs[-1].failure}
        told = {name: run.failure for name, (_, run) in failed_on.items() if run.failure is not None}
        permuted = self._auditor.permuted()
        jobs = {
            name: (sources[name], permuted[index])
            for name, (index, run) in failed_on.items()
            if run.outcome in _SPEAKING
        }
        for name, run in self._run_jobs(jobs).items() if jobs else ():
            told[name] = run.failure or Failure("error", "the program fails on some labels only")
        return told

    def _audit(
        self,
        scores: dict[str, Score],
        sources: Mapping[str, str],
        results: Mapping[str, list[SplitResult]],
    ) -> None:
        """Audit the best of the batch where it is a new best, and a share of the others."""
        ran = [action for action, score in scores.items() if score.outcome == "ok"]
        better = sorted(
            (action for action in ran if scores[action].reward > self._best),
            key=lambda action: scores[action].reward,
            reverse=True,
        )
        audited = {*filter(self._is_drawn, ran), *better[:1]}
        self._accuse([action for action in ran if action in audited], scores, sources, results)
        for action in better:
            if action not in audited:
                self._accuse([action], scores, sources, results)
            if scores[action].outcome != DISHONEST:
                self._best = scores[action].reward
                return

    def _accuse(
        self,
        actions: list[str],
        scores: dict[str, Score],
        sources: Mapping[str, str],
        results: Mapping[str, list[SplitResult]],
    ) -> None:
        chosen = {action: sources[action] for action in actions}
        if chosen:
            for action, what in self._auditor.audit(chosen, results).items():
                scores[action] = failed(DISHONEST, f"dishonest: {what}", scores[action].wall_s)

    def _is_drawn(self, action: str) -> bool:
        """True for a random share of all programs; which ones, only who has all labels can know."""
        key = secret(self.dataset.y, 2**33).tobytes()
        number = hashlib.sha256(key + action.encode("utf-8", "surrogatepass")).digest()[:8]
        return int.from_bytes(number, "little") < self.audit_share * 2**64


def failed(outcome: str, error: str, wall_s: float) -> Score:
    return Score(FAILURE_REWARD, outcome, None, None, error, wall_s, None)


def _one_line(failure: Failure, action: str, source: str) -> str:
    line = failure.line
    if line is not None and source != action:  # a bare body: the source has the signature before it
        line = max(1, line - 1)
    return describe_failure(failure.kind, failure.message, line)
