"""Statistics of a comparison by seeds: bootstrap intervals, paired differences, equal time, equal KL.

Everything here is a pure function of arrays: a row a seed (S), a column a program (P) or an iteration (I).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
WINDOW = 100
MOST_BINS = 12


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval; both bounds are the mean where there is one seed."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True where the whole interval lies on one side of 0; never with one seed."""
        return self.low < self.high and (self.low > 0.0 or self.high < 0.0)


@dataclass(frozen=True)
class FrontierPoint:
    """Reward at a KL to the reference, both means over the iterations that fell into one bin."""

    kl: float
    reward: float
    n_iterations: int


def resampled_weights(n: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Shares of each of n seeds in bootstrap resamples, [resamples, n]; each row sums to 1.

    The draws depend on nothing but the arguments: paired quantities that use the same weights stay paired.
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"expected at least one seed and one resample, got {n} and {resamples}")
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    flat = drawn + n * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=n * resamples).reshape(resamples, n)
    return counts / n


def tail(n: int, level: float = LEVEL) -> float:
    """The share of resamples left out at each end, so that `level` is kept with as few as n seeds.

    The plain percentiles (1 − level)/2 are those of a normal with a deviation that divides by n, and too
    narrow for a handful of seeds. Hesterberg's expanded percentiles put Student's quantile and n − 1 in their
    place: Φ(−√(n/(n − 1))·t) (The American Statistician 69(4), 2015, section 4.3).
    """
    if n < 2:
        return 0.0
    t = stats.t.ppf(0.5 + level / 2, n - 1)
    return float(stats.norm.cdf(-np.sqrt(n / (n - 1)) * t))


def interval_of(values_R: Floats, mean: float, n: int, level: float = LEVEL) -> Interval:
    """The interval that resampled values [R] of a statistic of n seeds give around its `mean`."""
    if n < 2:
        return Interval(mean, mean, mean)
    share = tail(n, level)
    low, high = np.quantile(values_R, [share, 1.0 - share])
    return Interval(mean, float(low), float(high))


def bootstrap_mean(
    x: Sequence[float] | Floats, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of x [n] with its bootstrap interval (expanded percentiles, see `tail`).

    Raises:
        ValueError: x is empty, not a vector, or not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected a vector of at least one finite number, got {x!r}")
    mean = x.mean()
    values_R = mean + resampled_weights(len(x), resamples, seed) @ (x - mean)  # equal numbers stay equal
    return interval_of(values_R, float(mean), len(x), level)


def paired_difference(
    x: Sequence[float] | Floats, y: Sequence[float] | Floats, *, level: float = LEVEL,
    resamples: int = RESAMPLES, seed: int = 0,
) -> Interval:  # fmt: skip
    """Mean of x − y, paired by position (the same seed), with its bootstrap interval.

    Raises:
        ValueError: x and y differ in length, or `bootstrap_mean` refuses.
    """
    if len(x) != len(y):
        raise ValueError(f"expected pairs, got {len(x)} and {len(y)} numbers")
    difference = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    return bootstrap_mean(difference, level=level, resamples=resamples, seed=seed)


def wilcoxon_p(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of x and y, paired by position; 1 where all pairs agree."""
    if len(x) != len(y):
        raise ValueError(f"expected pairs, got {len(x)} and {len(y)} numbers")
    difference = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    return 1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue)


def last_mean(rewards_P: Sequence[float] | Floats, window: int = WINDOW) -> float:
    """Mean of the last `window` rewards, or of the last half where there are fewer than two windows."""
    n = min(window, max(1, len(rewards_P) // 2))
    return float(np.mean(rewards_P[-n:]))


def within(rewards_P: Floats, cost_P: Floats, budget: float) -> Floats:
    """The rewards of the programs that were done when `budget` was spent; at least the first one.

    Args:
        cost_P: what was spent up to and with each program, never falling.
    """
    if rewards_P.shape != cost_P.shape or (np.diff(cost_P) < 0).any():
        raise ValueError("expected a cost a program that never falls")
    done = int(np.searchsorted(cost_P, budget * (1 + 1e-12), side="right"))
    return rewards_P[: max(1, done)]


def common_width(kl_highest: float) -> float:
    """A bin's width in nat a token, 1, 2 or 5 · 10ⁿ: at most about `MOST_BINS` bins up to `kl_highest`."""
    raw = max(kl_highest, 1e-6) / MOST_BINS
    power = 10.0 ** np.floor(np.log10(raw))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999))


def frontier(kl_I: Floats, reward_I: Floats, width: float) -> list[FrontierPoint]:
    """Reward against KL to the reference: means of the iterations in each bin of KL, by rising KL.

    Args:
        kl_I, reward_I: KL (nat a token) and mean reward of each iteration, already means over seeds.
        width: of a bin; bins begin at 0, what lies below counts as 0.
    """
    if kl_I.shape != reward_I.shape or kl_I.ndim != 1:
        raise ValueError(f"expected two vectors of one length, got {kl_I.shape} and {reward_I.shape}")
    bin_I = np.maximum(kl_I / width, 0.0).astype(np.int64)
    n_B = np.bincount(bin_I)
    kl_B, reward_B = np.bincount(bin_I, kl_I), np.bincount(bin_I, reward_I)
    known = np.flatnonzero(n_B)
    return [FrontierPoint(float(kl_B[b] / n_B[b]), float(reward_B[b] / n_B[b]), int(n_B[b])) for b in known]


def reward_at(points: Sequence[FrontierPoint], kl: float) -> float:
    """The frontier's reward at a KL, on straight lines between its points; level beyond both ends."""
    return float(np.interp(kl, [p.kl for p in points], [p.reward for p in points]))


def at_equal_kl(
    kl_SI: Floats, reward_SI: Floats, kl: float, width: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, Floats]:
    """Reward at a KL on the frontier of all seeds, and on that of each resample of seeds [R].

    Two algorithms with the same seeds in the same order are paired: subtract their resamples.
    """
    point = reward_at(frontier(kl_SI.mean(0), reward_SI.mean(0), width), kl)
    if len(kl_SI) < 2:
        return point, np.full(1, point)
    weights = resampled_weights(len(kl_SI), resamples, seed)
    rows = zip(weights @ kl_SI, weights @ reward_SI, strict=True)
    return point, np.array([reward_at(frontier(k, r, width), kl) for k, r in rows])


def running_mean(x_SP: Floats, window: int) -> Floats:
    """Mean of each program and those before it, `window` in all (fewer at the start), [S, P]."""
    total = np.cumsum(np.pad(x_SP, ((0, 0), (1, 0))), axis=1)
    upto = np.arange(1, x_SP.shape[1] + 1)
    since = np.maximum(upto - window, 0)
    means: Floats = (total[:, upto] - total[:, since]) / (upto - since)
    return means


def band(x_SP: Floats, *, resamples: int = 2_000, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Mean over seeds of each column with its bootstrap interval: (mean, low, high), each [P]."""
    mean: Floats = x_SP.mean(0)
    if len(x_SP) < 2:
        return mean, mean, mean
    share = tail(len(x_SP))
    means = resampled_weights(len(x_SP), resamples, seed) @ x_SP
    low, high = np.quantile(means, [share, 1.0 - share], axis=0)
    return mean, low, high


def decided(differences: Sequence[Interval]) -> bool:
    """True where every interval lies on one side of 0."""
    return all(one.excludes_zero() for one in differences)


def looks(first: int, most: int, each: int) -> list[int]:
    """The numbers of seeds at which a comparison may stop: `first`, then `each` more, up to `most`."""
    return [n for n in range(first, most, each) if n < most] + [max(first, most)] if first < most else [most]


def level_of_looks(n_looks: int, level: float = LEVEL) -> float:
    """The level of each of several looks that keeps `level` over all of them (Bonferroni)."""
    return 1.0 - (1.0 - level) / n_looks
