"""What came of the runs of a comparison, read from their folders."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etpo.bench.compare_runs import Case, Runs, Tell, Usage, beside
from etpo.bench.compare_statistics import Floats, last_mean, within
from etpo.engine.report.summary import learned
from etpo.engine.run_folder import RunFolder


@dataclass(frozen=True, eq=False)
class Result:
    """One finished run.

    Attributes:
        rewards_P: of every program, in order.
        kl_I, reward_I: KL to the reference (nat a token) of the policy that wrote an iteration's programs,
            and their mean reward.
        cpu_s_P: CPU seconds of the run's processes up to and with each program; None where nobody watched.
            Known for the whole process, it is shared out by the run's own clock.
        runnable_share: of the last programs (see `last_mean`).
        auc_running: mean AUC of those of them that ran; None where none did.
        best_text, auc_best: the program with the highest AUC.
        auc_fresh: of that program on split seeds 5–24; None where no program ran or nobody asked.
    """

    case: Case
    rewards_P: Floats
    kl_I: Floats
    reward_I: Floats
    cpu_s_P: Floats | None
    usage: Usage
    runnable_share: float
    auc_running: float | None
    best_text: str | None
    auc_best: float | None
    auc_fresh: float | None = None

    @property
    def last(self) -> float:
        """Mean reward of the last programs."""
        return last_mean(self.rewards_P)

    @property
    def kl(self) -> float:
        """KL to the reference of the last iteration, nat a token."""
        return float(self.kl_I[-1])

    def last_within(self, cpu_s: float) -> float | None:
        """Mean reward of the last of the programs that were done within so many CPU seconds."""
        return None if self.cpu_s_P is None else last_mean(within(self.rewards_P, self.cpu_s_P, cpu_s))

    def describe(self) -> str:
        """One line."""
        cost = "" if self.usage.cpu_s is None else f", {self.usage.cpu_s:.0f} CPU s"
        return f"mean reward of the last {self.last:+.3f}, KL {self.kl:.3f}{cost}"


def read_result(runs: Runs, case: Case) -> Result:
    """Read a finished run. Raises ValueError where it has no iteration."""
    path = runs.path(case)
    run = learned(RunFolder(path))
    usage = runs.usage(case)
    rewards_P = np.array([p.reward for p in run.programs], np.float64)
    steps = np.array([m["step"] for m in run.metrics])
    walls = np.array([m["wall_s"] for m in run.metrics], np.float64)
    iteration_P = np.searchsorted(steps, np.arange(1, len(rewards_P) + 1))
    cpu_s_P = None
    if usage.cpu_s is not None:
        cpu_s_P = usage.cpu_s * np.maximum.accumulate(walls / walls[-1])[iteration_P]
    return Result(
        case, rewards_P,
        np.array([_or_nan(m.get("kl_ref")) for m in run.metrics]),
        np.array([_or_nan(m["reward_mean"]) for m in run.metrics]),
        cpu_s_P, usage, run.last.runnable_share, run.last.auc_mean,
        run.best.text if run.best else None, run.best.auc_mean if run.best else None,
        _kept_fresh(path, run.best.text if run.best else None),
    )  # fmt: skip


def score_fresh(runs: Runs, cases: Sequence[Case], tell: Tell) -> None:
    """Score the best program of each run on split seeds 5–24, which chose nothing, and keep the score."""
    from etpo.envs.datasets import load_dataset
    from etpo.envs.sandbox import Sandbox
    from etpo.envs.scoring import Scorer

    waiting: dict[str, list[tuple[Path, str]]] = {}
    for case in cases:
        found = read_result(runs, case)
        if found.best_text is not None and found.auc_fresh is None:
            waiting.setdefault(case.dataset, []).append((runs.path(case), found.best_text))
    for dataset, programs in waiting.items():
        tell(f"{dataset}: scoring {len(programs)} best programs on fresh splits")
        some = runs.config(next(case for case in cases if case.dataset == dataset))
        with Sandbox(some.sandbox, some.timeout_s) as sandbox:
            scorer = Scorer(load_dataset(some.dataset, some.target, some.protocol), sandbox).fresh()
            for path, text in programs:
                score = scorer.score(text)
                record = {"sha256": _sha(text), "auc_fresh": score.auc_mean, "error": score.error}
                beside(path, ".fresh.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _kept_fresh(path: Path, text: str | None) -> float | None:
    """The kept score of this very program, or None."""
    file = beside(path, ".fresh.json")
    if text is None or not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    auc = record["auc_fresh"] if record["sha256"] == _sha(text) else None
    return None if auc is None else float(auc)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _or_nan(x: float | None) -> float:
    return float("nan") if x is None else x


def curves(results: Sequence[Result]) -> tuple[Floats, Floats]:
    """(KL, reward) of each iteration [S, I]; iterations that not every run has, with a KL, are left out."""
    n = min(len(result.kl_I) for result in results)
    kl_SI = np.stack([result.kl_I[:n] for result in results])
    reward_SI = np.stack([result.reward_I[:n] for result in results])
    is_known_I = (np.isfinite(kl_SI) & np.isfinite(reward_SI)).all(0)
    return kl_SI[:, is_known_I], reward_SI[:, is_known_I]
