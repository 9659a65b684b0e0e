"""When rounds start: at few times, which say little of when the round before ended."""

import math

import pytest

from etpo.envs import pacing


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes where somebody sleeps, or says so."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


def starts_after(pace, clock, ends_s, programs):
    """Seconds from the start of a round to that of the next, for each time at which a round ends."""
    found = []
    for end_s in ends_s:
        begun = clock.now
        clock.now += end_s
        pace.next_round(programs)
        found.append(clock.now - begun)
    return found


def test_the_next_round_starts_at_one_of_few_times(clock):
    pace = pacing.Pace(workers=2)
    pace.start(8)
    ends_s = [0.2 + 0.0001 * k for k in range(200)]
    starts_after(pace, clock, ends_s, 8)
    started = starts_after(pace, clock, [0.25 * (1 + 0.01 * k) for k in range(32)], 8)
    assert len({round(one, 6) for one in started}) <= 5


def test_a_round_never_starts_before_the_one_before_has_ended(clock):
    pace = pacing.Pace(workers=2)
    pace.start(8)
    for end_s in (0.001, 0.5, 20.0):
        (started_s,) = starts_after(pace, clock, [end_s], 8)
        assert started_s >= end_s
        assert started_s <= max(pacing.SHORTEST_S, pacing.RATIO * end_s)


def test_from_the_shortest_to_the_longest_split_the_times_are_few():
    pace = pacing.Pace(workers=2)
    times = {round(pace.step_of(0.01 * 1.01**k, 1), 6) for k in range(800)}
    assert len([one for one in times if one < 20]) <= 1 + math.log(20 / pacing.SHORTEST_S, pacing.RATIO)


def test_what_rounds_usually_take_counts_by_turns_of_the_workers(clock):
    pace = pacing.Pace(workers=2)
    pace.start(8)
    starts_after(pace, clock, [0.4] * 5, 8)
    for turns in (1, 4):
        over_usual = pace.step_of(0.0, turns) / (pacing.ALLOWANCE * 0.1 * turns)
        assert 1 <= over_usual <= pacing.FINE_RATIO
