"""The statistics of a comparison: known cases, coverage on synthetic data, pairs kept together."""

import numpy as np
import pytest
from scipy import stats

from etpo.bench.compare_statistics import (
    FrontierPoint,
    Interval,
    at_equal_kl,
    band,
    bootstrap_mean,
    common_width,
    decided,
    frontier,
    interval_of,
    last_mean,
    level_of_looks,
    looks,
    paired_difference,
    resampled_weights,
    reward_at,
    running_mean,
    tail,
    wilcoxon_p,
    within,
)


def test_resamples_are_shares_of_seeds_and_the_same_each_time():
    weights = resampled_weights(7, 500)
    assert weights.shape == (500, 7)
    assert np.allclose(weights.sum(1), 1.0)
    assert np.array_equal(weights * 7, np.rint(weights * 7))
    assert np.array_equal(weights, resampled_weights(7, 500))
    # a seed's share has the moments of a multinomial's: mean 1/n, variance (1/n)(1 − 1/n)/n
    many = resampled_weights(7, 200_000)
    assert np.allclose(many.mean(0), 1 / 7, atol=1e-3)
    assert np.allclose(many.var(0), (1 / 7) * (6 / 7) / 7, rtol=0.02)


@pytest.mark.parametrize("n", [5, 16])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_hold_the_true_mean_about_as_often_as_they_say(n: int, skewed: bool):
    rng = np.random.default_rng(1)
    draw = (lambda: rng.exponential(1.0, n) - 1.0) if skewed else (lambda: rng.normal(0.0, 1.0, n))
    held = [
        one.low <= 0.0 <= one.high for one in (bootstrap_mean(draw(), resamples=1000) for _ in range(500))
    ]
    # plain percentiles hold the mean of 5 numbers far less often; an exponential is hard for any method
    assert (0.80 if skewed else 0.91) <= np.mean(held) <= 0.98


def test_expanded_percentiles_are_students_interval_of_normal_numbers():
    for n in (5, 16, 100):
        reach = stats.norm.ppf(tail(n)) * np.sqrt((n - 1) / n)
        assert reach == pytest.approx(-stats.t.ppf(0.975, n - 1))
    assert tail(10**7) == pytest.approx(0.025, rel=1e-4)


def test_a_mean_of_equal_numbers_and_of_one_number_has_no_width():
    assert bootstrap_mean([0.25] * 6) == Interval(0.25, 0.25, 0.25)
    one = bootstrap_mean([0.5])
    assert one == Interval(0.5, 0.5, 0.5)
    assert not one.excludes_zero()
    for bad in ([], [1.0, float("nan")], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_mean(bad)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    x = rng.normal(0.0, 1.0, 16)
    paired = paired_difference(x + 0.1 + rng.normal(0, 0.01, 16), x)
    assert paired.excludes_zero()
    assert paired.mean == pytest.approx(0.1, abs=0.01)
    unpaired = paired_difference(x + 0.1, x[::-1])
    assert not unpaired.excludes_zero()
    assert paired_difference(x, x) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="pairs"):
        paired_difference(x, x[:5])


def test_a_difference_of_two_equal_algorithms_is_rarely_decided():
    rng = np.random.default_rng(2)
    found = [
        paired_difference(*rng.normal(0, 1, (2, 16)), resamples=1000).excludes_zero() for _ in range(400)
    ]
    assert 0.02 <= np.mean(found) <= 0.08


def test_wilcoxon_known_cases():
    x = np.arange(1.0, 7.0)
    assert wilcoxon_p(x, np.zeros(6)) == pytest.approx(2 / 2**6)  # all six of one sign, both sides
    assert wilcoxon_p(x, -x[::-1]) == pytest.approx(2 / 2**6)
    assert wilcoxon_p(x, x) == 1.0


def test_last_mean_takes_a_window_or_half():
    assert last_mean(np.arange(300.0)) == np.arange(200.0, 300.0).mean()
    assert last_mean([0.0, 0.0, 1.0, 3.0]) == 2.0
    assert last_mean([5.0]) == 5.0


def test_within_a_budget_are_the_programs_that_were_done_by_then():
    rewards, cost = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 10.0, 20.0, 20.0])
    assert within(rewards, cost, 20.0).tolist() == [1, 2, 3, 4]
    assert within(rewards, cost, 19.9).tolist() == [1, 2]
    assert within(rewards, cost, 1.0).tolist() == [1]
    with pytest.raises(ValueError, match="never falls"):
        within(rewards, cost[::-1], 1.0)


def test_a_frontier_is_the_means_in_each_bin_by_rising_kl():
    kl, reward = np.array([0.0, 0.3, 0.1, -1e-9, 0.11]), np.array([1.0, 5.0, 2.0, 2.0, 4.0])
    points = frontier(kl, reward, 0.1)
    assert [(p.kl, p.reward, p.n_iterations) for p in points] == [
        (pytest.approx(0.0, abs=1e-8), 1.5, 2),
        (pytest.approx(0.105), 3.0, 2),
        (pytest.approx(0.3), 5.0, 1),
    ]
    assert reward_at(points, 0.2025) == pytest.approx(4.0)
    assert reward_at(points, 9.0) == 5.0
    assert reward_at([FrontierPoint(0.1, 0.5, 1)], 0.0) == 0.5


def test_bins_are_round_and_few():
    for highest in (1e-4, 0.03, 0.14, 0.97, 12.0):
        width = common_width(highest)
        assert highest / width <= 12.01
        assert highest / width >= 12 / 2.5 - 1e-9
        assert f"{width:e}"[0] in "125"


def test_at_equal_kl_an_algorithm_that_only_moves_further_is_no_better():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.01, (16, 1))
    slow, fast = np.linspace(0, 0.1, 11), np.linspace(0, 0.3, 11)
    kl_SI = [np.tile(one, (16, 1)) for one in (slow, fast)]
    reward_SI = [2.0 * kl + noise for kl in kl_SI]
    width = common_width(0.3)
    (x, x_R), (y, y_R) = (at_equal_kl(k, r, 0.08, width) for k, r in zip(kl_SI, reward_SI, strict=True))
    assert x == pytest.approx(y, abs=0.02)
    less = interval_of(x_R - y_R, x - y, 16)
    assert less.high - less.low < 1e-9  # the noise is the seeds', and so shared
    assert at_equal_kl(kl_SI[0][:1], reward_SI[0][:1], 0.05, width)[1].shape == (1,)


def test_running_means_and_bands():
    x = np.array([[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]])
    assert running_mean(x, 2).tolist() == [[0, 1, 3, 5], [1, 2, 4, 6]]
    mean, low, high = band(x)
    assert mean.tolist() == [0.5, 2.5, 4.5, 6.5]
    assert (low <= mean).all()
    assert (high >= mean).all()
    assert (low < high).all()
    assert [part.tolist() for part in band(x[:1])] == [x[0].tolist()] * 3


def test_stopping_looks_after_sixteen_and_keeps_the_level_over_all_looks():
    assert looks(16, 32, 4) == [16, 20, 24, 28, 32]
    assert looks(16, 18, 4) == [16, 18]
    assert looks(16, 16, 4) == [16]
    assert looks(16, 8, 4) == [8]
    assert level_of_looks(5) == pytest.approx(0.99)
    assert level_of_looks(1) == pytest.approx(0.95)
    assert decided([Interval(0.1, 0.05, 0.2), Interval(-0.1, -0.2, -0.01)])
    assert not decided([Interval(0.1, 0.05, 0.2), Interval(0.1, -0.01, 0.2)])
