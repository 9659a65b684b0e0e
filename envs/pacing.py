"""When the splits of a batch of programs start: at times that tell little of when those before them ended.

A program decides when its split ends, and the next split of the same program can read the clock. The start of
each round is therefore put off to the next of a few times after the round before: a short time, doubled again
and again. The short time is what rounds usually take, so that most wait little or not at all.
"""

import statistics
import time
from collections import deque

SHORTEST_S = 1 / 32
RATIO = 2.0
REMEMBERED = 32  # rounds that the usual time is the median of
ALLOWANCE = 1.25  # the first time to start is that much later than the usual end


class Pace:
    """Puts off the starts of rounds; remembers how long a program of a round usually takes."""

    def __init__(self) -> None:
        self._each_s: deque[float] = deque(maxlen=REMEMBERED)
        self._started = 0.0
        self._programs = 1

    def start(self, programs: int) -> None:
        """The first round of a batch starts now."""
        self._started, self._programs = time.monotonic(), programs

    def next_round(self, programs: int) -> None:
        """Wait until the next round may start."""
        took_s = time.monotonic() - self._started
        time.sleep(max(0.0, self.step_of(took_s, self._programs) - took_s))
        self._each_s.append(took_s / self._programs)
        self.start(programs)

    def step_of(self, took_s: float, programs: int) -> float:
        """The first of the permitted times after a start that is not before `took_s`."""
        usual_s = statistics.median(self._each_s) if self._each_s else 0.0
        step_s = max(SHORTEST_S, ALLOWANCE * usual_s * programs)
        while step_s < took_s:
            step_s *= RATIO
        return step_s
