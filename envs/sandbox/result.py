"""What came of one split: read from what the child sent and from how its process ended."""

import re
import signal
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from etpo.envs.sandbox.box import wire

MAX_PRECISION = 2.0**-10  # of float16


@dataclass(frozen=True)
class Failure:
    """Why a program failed: the exception's kind, its message, the line of the source (None: not in it)."""

    kind: str
    message: str
    line: int | None = None


@dataclass(frozen=True)
class SplitResult:
    """What came of one split.

    Attributes:
        outcome: one of `wire.OUTCOMES`.
        proba: [rows, columns] float64 as the program returned it, only known to be readable; else None.
        failure: what went wrong, None for `ok`.
        stdout: the first characters of what the program printed.
        wall_s: seconds from the fork to the end of the process.
        precision: spacing at 1 of the numbers that the program returned: of float16, 0.001.
    """

    outcome: str
    proba: np.ndarray | None
    failure: Failure | None
    stdout: str
    wall_s: float
    precision: float = 0.0


def result_of(received: bytes, how: int, value: int, wall_s: float, timeout_s: float) -> SplitResult:
    """What came of a split.

    Args:
        received: all that came through the result pipe. Nothing in it is trusted.
        how, value: how the process ended, as `wire.REPORT` has it.
        wall_s: seconds that it took.
        timeout_s: seconds that it was allowed.
    """
    if how == wire.TIMED_OUT:
        failure = Failure("timeout", f"the program took more than {timeout_s:g} s on one split")
        return SplitResult("timeout", None, failure, "", wall_s)
    if how == wire.EXITED and value == 0 and (result := _read_frame(received, wall_s)):
        return result
    if how == wire.SIGNALLED and value == signal.SIGXCPU:
        failure = Failure("timeout", "the program used more processor time than one split may")
        return SplitResult("timeout", None, failure, "", wall_s)
    if how == wire.EXITED and value == wire.EXIT_NO_MEMORY:
        return SplitResult("memory", None, _no_memory(), "", wall_s)
    if how == wire.OUT_OF_MEMORY:
        return SplitResult("memory", None, _no_memory(), "", wall_s)
    if how == wire.TOO_MANY_PROCESSES:
        ended = "started more processes than it may"
    else:  # which code or signal is the program's choice, and so would be a message of its own
        ended = "ended" if how == wire.EXITED else "was killed by a signal"
    failure = Failure("crashed", f"the process {ended} before the model was returned")
    return SplitResult("crashed", None, failure, "", wall_s)


def sent_too_much(wall_s: float) -> SplitResult:
    """The result of a split that sent more than a result can be."""
    failure = Failure("invalid output", "the program sent more than a result")
    return SplitResult("invalid_output", None, failure, "", wall_s)


def _no_memory() -> Failure:
    return Failure("MemoryError", "the program needs more memory than it may use")


def _read_frame(frame: bytes, wall_s: float) -> SplitResult | None:
    """Parse what a child sent; None where it is no frame. Nothing in it is trusted."""
    if len(frame) < wire.FRAME.size:
        return None
    magic, outcome, line, precision, rows, columns, *sizes = wire.FRAME.unpack_from(frame)
    array_bytes = 8 * rows * columns
    if magic != wire.MAGIC or len(frame) != wire.FRAME.size + array_bytes + sum(sizes):
        return None
    text_start = wire.FRAME.size + array_bytes
    ends = np.cumsum([text_start, *sizes])
    kind, message, stdout = (frame[start:end].decode("utf-8", "replace") for start, end in pairwise(ends))
    if outcome == wire.OK:
        proba = np.frombuffer(frame, np.float64, rows * columns, wire.FRAME.size).reshape(rows, columns)
        return SplitResult("ok", proba, None, stdout, wall_s, min(max(precision, 0.0), MAX_PRECISION))
    if outcome == wire.MEMORY:
        return SplitResult("memory", None, _no_memory(), stdout, wall_s)
    if outcome not in (wire.ERROR, wire.REFUSED, wire.INVALID_OUTPUT):
        return None
    kind = re.sub(r"[^\w. ]", "", kind) or "Exception"
    # Addresses differ from run to run; the prompt that shows the message must not.
    message = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", message)
    return SplitResult(wire.OUTCOMES[outcome], None, Failure(kind, message, line or None), stdout, wall_s)
