"""When the splits of a batch of programs start: at times that tell little of when those before them ended.

A program decides when its split ends, and the next split of the same program can read the clock. The start of
each round is therefore put off to the next of a few times after the round before: a short time, then always
half as much again. The short time is what rounds usually take, so that most wait little or not at all.
"""

import statistics
import time
from collections import deque

SHORTEST_S = 1 / 32
RATIO = 1.5
FINE_RATIO = RATIO ** (1 / 3)  # to which the usual time is known: it shall not tell what it was made of
REMEMBERED = 9  # rounds that the usual time is the median of: after a slow spell it is soon forgotten
ALLOWANCE = 1.05  # the first time to start is that much later than the usual end


class Pace:
    """Puts off the starts of rounds; remembers how long `workers` programs, one each, usually take."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._each_s: deque[float] = deque(maxlen=REMEMBERED)
        self._started = 0.0
        self._turns = 1

    def start(self, programs: int) -> None:
        """The first round of a batch starts now."""
        self._started, self._turns = time.monotonic(), -(-programs // self._workers)

    def next_round(self, programs: int) -> None:
        """Wait until the next round may start."""
        took_s = time.monotonic() - self._started
        time.sleep(max(0.0, self.step_of(took_s, self._turns) - took_s))
        self._each_s.append(took_s / self._turns)
        self.start(programs)

    def step_of(self, took_s: float, turns: int) -> float:
        """The first of the permitted times after a start that is not before `took_s`."""
        usual_s = statistics.median(self._each_s) if self._each_s else 0.0
        step_s = _next_of(SHORTEST_S, FINE_RATIO, ALLOWANCE * usual_s * turns)
        return _next_of(step_s, RATIO, took_s)


def _next_of(first: float, ratio: float, value: float) -> float:
    """The first of `first`, `first` × ratio, `first` × ratio², … that is not below a value."""
    while first < value:
        first *= ratio
    return first
