"""What scoring asks of whatever runs programs; `etpo.envs.sandbox.Sandbox` is the one that etpo brings."""

from collections.abc import Iterable
from typing import Protocol

from etpo.envs.sandbox import SplitArrays
from etpo.envs.sandbox.result import SplitResult


class Runner(Protocol):
    """Runs jobs (program, arrays of one split, seed). Labels to score by are never given to it."""

    @property
    def workers(self) -> int:
        """How many jobs run at once."""

    def run(
        self, jobs: Iterable[tuple[str, SplitArrays, int]], timeout_s: float | None = None
    ) -> list[SplitResult]:
        """Results in the order of the jobs, whatever the programs do.

        Args:
            jobs: complete sources that define `build_model`; what they are given; and what `random` and
                `np.random` are seeded with.
            timeout_s: processor seconds for each; None: the runner's own.
        """

    def cancel(self) -> None:
        """Drop all that is under way, as after an interrupt; the runner stays usable."""

    def close(self) -> None:
        """End, with all that still runs."""
