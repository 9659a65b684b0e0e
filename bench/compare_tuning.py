"""Tuning: every algorithm gets as many runs over its own step sizes, on seeds that no table reports.

Run i of an algorithm takes setting i of its grid, counted around, with tuning seed 100 + i // (size of the
grid): all settings meet a seed before the next seed. Taken is the setting with the highest mean reward of the
last programs, over the seeds that all settings have met; the first of equals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from etpo.bench.compare_variants import Settings, Variant
from etpo.engine.options import nearest

FIRST_SEED = 100
FAILED = -1.0  # what a run counts that did not reach its end: as if every program had failed


def _grid(**values: tuple[float, ...]) -> tuple[Settings, ...]:
    """All combinations, the last option changing fastest."""
    return tuple(tuple(zip(values, row, strict=True)) for row in product(*values.values()))


# The step size of the policy beside what bounds or shapes a step; as many settings for all, so that the same
# number of runs tries the same share of each grid.
GRIDS: dict[str, tuple[Settings, ...]] = {
    "etpo": _grid(lr=(0.1, 0.4), max_kl_update=(0.02, 0.05, 0.1)),
    "etpo-q": _grid(critic_lr=(0.6, 1.2), max_kl_update=(0.02, 0.05, 0.1)),
    "ppo-kl": _grid(lr=(0.1, 0.4), max_kl_update=(0.02, 0.05, 0.1)),
    "rloo": _grid(lr=(0.1, 0.4), max_kl_update=(0.02, 0.05, 0.1)),
    "grpo": _grid(lr=(0.1, 0.4), max_kl_update=(0.02, 0.05, 0.1)),
}


@dataclass(frozen=True)
class Trial:
    """One tuning run: what was tried, and the mean reward of its last programs (`FAILED` where it failed)."""

    settings: Settings
    seed: int
    reward: float
    kl: float | None
    failure: str | None = None


def grid_of(algo: str) -> tuple[Settings, ...]:
    """The settings that an algorithm is tuned over. Raises ValueError for one without step sizes."""
    if algo not in GRIDS:
        known = list(GRIDS)
        raise ValueError(f"expected an algorithm with a grid of step sizes ({', '.join(known)}), got "
                         f"'{algo}'{nearest(algo, known)}")  # fmt: skip
    return GRIDS[algo]


def drawn(variant: Variant, n: int) -> list[tuple[Settings, int]]:
    """The first n (settings, seed) of an algorithm's tuning."""
    grid = grid_of(variant.algo)
    return [(grid[i % len(grid)], FIRST_SEED + i // len(grid)) for i in range(n)]


def best(trials: Sequence[Trial]) -> Settings:
    """The setting with the highest mean reward over the seeds that every tried setting has met.

    Raises:
        ValueError: no trial, or every one failed.
    """
    if all(trial.failure is not None for trial in trials):
        told = trials[0].failure if trials else "there was none"
        raise ValueError(f"expected a tuning run that reaches its end, got none: {told}")
    tried = list(dict.fromkeys(trial.settings for trial in trials))
    seeds_of = {s: {t.seed for t in trials if t.settings == s} for s in tried}
    shared = set.intersection(*seeds_of.values())
    means = {
        s: fmean(t.reward for t in trials if t.settings == s and (t.seed in shared or not shared))
        for s in tried
    }
    return max(tried, key=lambda s: means[s])
