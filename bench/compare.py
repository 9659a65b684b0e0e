"""A fair comparison of algorithms: tuned alike, paired by seed, at equal programs, CPU time and KL.

1. Every algorithm gets the same number of tuning runs over its own step sizes (`compare_tuning`), on seeds
   that are not reported.
2. With the best setting of each, the same seeds 0 … n − 1 are run for all.
3. Reported are means and paired differences to the first algorithm with bootstrap intervals: at equal
   programs, at equal CPU time, and at equal KL to the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etpo.bench.compare_results import Result, curves, read_result, score_fresh
from etpo.bench.compare_runs import Case, ComparisonError, Runs, Tell
from etpo.bench.compare_statistics import (
    Floats,
    FrontierPoint,
    Interval,
    at_equal_kl,
    bootstrap_mean,
    common_width,
    decided,
    frontier,
    interval_of,
    level_of_looks,
    looks,
    paired_difference,
    wilcoxon_p,
)
from etpo.bench.compare_tuning import FAILED, Trial, best, drawn, grid_of
from etpo.bench.compare_variants import FROZEN, Settings, Variant

LEAST_SEEDS = 16  # before a comparison may stop
SEEDS_A_LOOK = 4


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        variants: the first is the one that the others are compared with.
        n_seeds: paired seeds 0 … n − 1; with `decide`, the most.
        n_tune: tuning runs of each algorithm; 0: every algorithm as it is by default.
        decide: stop adding seeds once every difference is decided, not before `LEAST_SEEDS`.
        fresh: score best programs on fresh splits, and run the frozen model beside.
    """

    variants: tuple[Variant, ...]
    dataset: str
    steps: int
    n_seeds: int
    n_tune: int
    decide: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class EqualKl:
    """Reward at one KL: of an algorithm, and less that of the first algorithm (paired by seed)."""

    kl: float
    reward: Interval
    difference: Interval


@dataclass(frozen=True)
class Rival:
    """The first algorithm less this one, paired by seed, at equal programs and at equal CPU time."""

    difference: Interval
    wilcoxon_p: float
    at_equal_cpu: Interval | None


@dataclass(frozen=True)
class Row:
    """One algorithm.

    Attributes:
        last, highest: mean reward of the last programs, and the highest reward of any program.
        at_equal_cpu: mean reward of the last of the programs that were done within the CPU time that the
            fastest algorithm needed with the same seed; None where a run's CPU time is not known.
        auc_fresh: best program on fresh splits; None where nobody asked or no program ran.
        cpu_s: CPU seconds of a run; None where it is not known.
        rival: None for the first algorithm.
    """

    variant: Variant
    results: tuple[Result, ...]
    last: Interval
    highest: Interval
    at_equal_cpu: Interval | None
    auc_fresh: Interval | None
    runnable_share: float
    kl: float
    cpu_s: float | None
    points: tuple[FrontierPoint, ...]
    equal_kl: tuple[EqualKl, ...]
    rival: Rival | None


@dataclass(frozen=True)
class Comparison:
    """A finished comparison; `frozen` is the model that learns nothing, with as many programs."""

    plan: Plan
    trials: dict[str, tuple[Trial, ...]]
    rows: tuple[Row, ...]
    frozen: Row | None
    level_of_stopping: float | None


def compare(plan: Plan, runs: Runs, tell: Tell) -> Comparison:
    """Tune, run and sum up.

    Args:
        runs: where runs are; those that are finished are only read.
        tell: called with a line for each run.

    Raises:
        ComparisonError: a reported run failed; the others were finished before.
        ValueError: an algorithm has no grid of step sizes, or an option takes no such value.
    """
    if plan.n_tune:
        for variant in plan.variants:
            grid_of(variant.algo)
    trials = tune(plan, runs, tell) if plan.n_tune else {}
    chosen = [v.with_settings(best(trials[v.name])) if v.name in trials else v for v in plan.variants]
    n_seeds, level = _run_seeds(plan, chosen, runs, tell)
    results = [[read_result(runs, case) for case in _cases(v, plan, n_seeds)] for v in chosen]
    frozen = None
    if plan.fresh:
        cases = [case for v in chosen for case in _cases(v, plan, n_seeds)]
        others = _cases(Variant("frozen model", FROZEN), plan, n_seeds)
        make_all(others, runs, tell)
        score_fresh(runs, [*cases, *others], tell)
        results = [[read_result(runs, case) for case in _cases(v, plan, n_seeds)] for v in chosen]
        frozen = rows_of([[read_result(runs, case) for case in others]])[0]
    return Comparison(plan, trials, rows_of(results), frozen, level)


def tune(plan: Plan, runs: Runs, tell: Tell) -> dict[str, tuple[Trial, ...]]:
    """The tuning runs of every algorithm, by its name."""
    cases: dict[str, list[tuple[Settings, Case]]] = {}
    for variant in plan.variants:
        cases[variant.name] = [
            (settings, Case(variant.with_settings(settings), plan.dataset, seed, plan.steps))
            for settings, seed in drawn(variant, plan.n_tune)
        ]
    in_turn = [case for column in zip(*cases.values(), strict=True) for _, case in column]
    failures = runs.make(in_turn, tell, lambda case: read_result(runs, case).describe())
    return {
        name: tuple(_trial(runs, settings, case, failures.get(case)) for settings, case in own)
        for name, own in cases.items()
    }


def _trial(runs: Runs, settings: Settings, case: Case, failure: str | None) -> Trial:
    if failure is not None:
        return Trial(settings, case.seed, FAILED, None, failure)
    result = read_result(runs, case)
    return Trial(settings, case.seed, result.last, result.kl)


def _cases(variant: Variant, plan: Plan, n_seeds: int) -> list[Case]:
    return [Case(variant, plan.dataset, seed, plan.steps) for seed in range(n_seeds)]


def make_all(cases: Sequence[Case], runs: Runs, tell: Tell) -> None:
    """Make reported runs. Raises ComparisonError where one did not reach its end, after all others did."""
    failures = runs.make(cases, tell, lambda case: read_result(runs, case).describe())
    if failures:
        case, told = next(iter(failures.items()))
        raise ComparisonError(
            f"{len(failures)} of {len(cases)} runs failed, the first: {case}: {told}; see its .log beside "
            f"{runs.path(case)}, and give the command again to go on"
        )


def _run_seeds(
    plan: Plan, chosen: Sequence[Variant], runs: Runs, tell: Tell
) -> tuple[int, float | None]:  # fmt: skip
    """Run seed after seed for all algorithms: how many there are now, and the level of each look."""
    stops = looks(LEAST_SEEDS, plan.n_seeds, SEEDS_A_LOOK) if plan.decide else [plan.n_seeds]
    level = level_of_looks(len(stops))
    for n_seeds in stops:
        by_variant = [_cases(variant, plan, n_seeds) for variant in chosen]
        make_all([case for column in zip(*by_variant, strict=True) for case in column], runs, tell)
        if plan.decide and n_seeds < plan.n_seeds:
            last = [[read_result(runs, case).last for case in own] for own in by_variant]
            differences = [paired_difference(last[0], other, level=level) for other in last[1:]]
            if decided(differences):
                tell(f"decided after {n_seeds} seeds, at level {level:.4f} a look")
                break
    return n_seeds, level if plan.decide else None


def rows_of(results: Sequence[Sequence[Result]]) -> tuple[Row, ...]:
    """A row for each algorithm; runs at the same place of every list have the same seed."""
    budget_S = _fastest(results)
    kl_reward = [curves(own) for own in results]
    trained = [kl for kl, _ in kl_reward if kl.size]
    width = common_width(max((float(kl.mean(0).max()) for kl in trained), default=1.0))
    at_kl = _at_equal_kl(results, width)
    at_cpu = [_within(own, budget_S) for own in results]
    rows = []
    for i, own in enumerate(results):
        kl_SI, reward_SI = kl_reward[i]
        cpu_s = [r.usage.cpu_s for r in own if r.usage.cpu_s is not None]
        fresh = [r.auc_fresh for r in own if r.auc_fresh is not None]
        cpu_S = at_cpu[i]
        rows.append(Row(
            own[0].case.variant, tuple(own),
            bootstrap_mean([r.last for r in own]),
            bootstrap_mean([float(r.rewards_P.max()) for r in own]),
            None if cpu_S is None else bootstrap_mean(cpu_S),
            bootstrap_mean(fresh) if fresh else None,
            float(np.mean([r.runnable_share for r in own])),
            float(np.mean([r.kl for r in own])),
            float(np.mean(cpu_s)) if len(cpu_s) == len(own) else None,
            tuple(frontier(kl_SI.mean(0), reward_SI.mean(0), width)) if kl_SI.size else (),
            at_kl[i],
            _rival(results[0], own, at_cpu[0], cpu_S) if i else None,
        ))  # fmt: skip
    return tuple(rows)


def _rival(
    first: Sequence[Result], own: Sequence[Result], cpu_first: Sequence[float] | None,
    cpu_own: Sequence[float] | None,
) -> Rival:  # fmt: skip
    x, y = [r.last for r in first], [r.last for r in own]
    both_known = cpu_first is not None and cpu_own is not None
    at_equal_cpu = paired_difference(cpu_first, cpu_own) if both_known else None  # type: ignore[arg-type]
    return Rival(paired_difference(x, y), wilcoxon_p(x, y), at_equal_cpu)


def _fastest(results: Sequence[Sequence[Result]]) -> list[float] | None:
    """CPU seconds, by seed, of the learning algorithm that needed the fewest in the mean; None: not known."""
    costs = [
        [r.usage.cpu_s for r in own if r.usage.cpu_s is not None]
        for own in results
        if own[0].case.variant.algo != FROZEN
    ]
    if not costs or any(len(cost) < len(results[0]) for cost in costs):
        return None
    return min(costs, key=lambda cost: float(np.mean(cost)))


def _within(own: Sequence[Result], budget_S: Sequence[float] | None) -> list[float] | None:
    if budget_S is None:
        return None
    found = [r.last_within(cpu_s) for r, cpu_s in zip(own, budget_S, strict=True)]
    return None if any(x is None for x in found) else [x for x in found if x is not None]


def _at_equal_kl(results: Sequence[Sequence[Result]], width: float) -> list[tuple[EqualKl, ...]]:
    """Rewards at the highest KL that all learning algorithms reached, and at half of it.

    Nothing for the frozen model, and for none where one algorithm did not move.
    """
    moved = {i: curves(own) for i, own in enumerate(results) if own[0].case.variant.algo != FROZEN}
    highest = min((_highest(*pair, width) for pair in moved.values()), default=0.0)
    found: list[list[EqualKl]] = [[] for _ in results]
    for kl in (highest / 2, highest) if highest > 0.0 else ():
        first: tuple[float, Floats] | None = None
        for i, (kl_SI, reward_SI) in moved.items():
            point, values_R = at_equal_kl(kl_SI, reward_SI, kl, width)
            first = first or (point, values_R)
            less = interval_of(first[1] - values_R, first[0] - point, len(kl_SI))
            found[i].append(EqualKl(kl, interval_of(values_R, point, len(kl_SI)), less))
    return [tuple(own) for own in found]


def _highest(kl_SI: Floats, reward_SI: Floats, width: float) -> float:
    """The KL of a frontier's last point; 0 where there is none."""
    return frontier(kl_SI.mean(0), reward_SI.mean(0), width)[-1].kl if kl_SI.size else 0.0
