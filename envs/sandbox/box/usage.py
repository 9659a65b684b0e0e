"""What all processes of one program take together, read from /proc. Standard library only."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from .proc import list_proc, open_proc

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Processor seconds (of processes that have ended, too), bytes of memory of their own, threads."""

    cpu_s: float
    memory_bytes: int
    threads: int


def usage_below(roots: Iterable[int], shared_bytes: int, counted: Iterable[int]) -> Usage:
    """The sum over processes and all that descend from them.

    Args:
        roots: where to begin.
        shared_bytes: what each process has from the server that it was forked from, not counted.
        counted: those of the roots that count themselves; of the others only what descends from them does.
    """
    cpu_s, memory, threads = 0.0, 0, 0
    own, waiting, seen = set(counted), list(roots), set()
    while waiting:
        pid = waiting.pop()
        if pid in seen:
            continue
        seen.add(pid)
        with contextlib.suppress(OSError):
            for thread in list_proc(f"{pid}/task"):
                with open_proc(f"{pid}/task/{thread}/children") as file:
                    found = [int(child) for child in file.read().split()]
                waiting += found
                own |= set(found)
        with contextlib.suppress(OSError, ValueError):
            used_s, bytes_, count = _one(pid)
            cpu_s += used_s
            if pid in own:
                memory += max(0, bytes_ - shared_bytes)
                threads += count
    return Usage(cpu_s, memory, threads)


def own_bytes(pid: int | str) -> int:
    """Memory of a process that is no file's: its own, and that which it shares with its children."""
    with open_proc(f"{pid}/status") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:")))


def pid_of(pidfd: int) -> int:
    """The process that a pidfd of ours stands for; -1 where it has ended."""
    with open_proc(f"self/fdinfo/{pidfd}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)


def _one(pid: int) -> tuple[float, int, int]:
    with open_proc(f"{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    # User and system time, then those of children that have been waited for.
    return sum(map(int, fields[11:15])) / _TICKS_PER_S, own_bytes(pid), int(fields[17])
