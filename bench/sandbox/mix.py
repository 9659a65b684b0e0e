"""Hostile programs, mixed at random through the vector runner: what is there before must be there after."""

import contextlib
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from etpo.bench.sandbox.hostile import HOSTILE, Hostile
from etpo.bench.sandbox.throughput import PROGRAM, about, small_table
from etpo.envs.data_science import DataScience
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Scorer
from etpo.envs.vector import VectorRunner

BATCH = 10


def split_processes(server: int) -> list[int]:
    """Processes of programs below a sandbox's server, zombies too: the splits and all that they forked."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    head, _, tail = file.read().rpartition(")")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry)], names[int(entry)] = int(tail.split()[1]), head.partition("(")[2]

    def is_below(pid: int) -> bool:
        while pid in parents and pid != server:
            pid = parents[pid]
        return pid == server

    return [pid for pid, name in names.items() if name == "etpo-split" and is_below(pid)]


def can_be_held(sandbox: Sandbox, hostile: Hostile) -> bool:
    """True where no layer is missing that the program needs."""
    return not set(hostile.needs) & set(sandbox.layers().missing)


def state_of(sandbox: Sandbox) -> dict[str, int]:
    """Counts that must be the same before and after, whatever ran: processes, descriptors, files, mounts."""
    assert sandbox._process is not None
    server = sandbox._process.pid
    helpers = _children(server)
    state = {
        "server": server,
        "processes of programs": len(split_processes(server)),
        "helpers of the server": len(helpers),
        "files in the sandbox's folder": len(os.listdir(sandbox._folder)),
        "threads of the trainer": len(os.listdir("/proc/self/task")),
        "descriptors of the trainer": len(os.listdir("/proc/self/fd")),
    }
    with contextlib.suppress(PermissionError):  # without root nobody looks into the server
        state["descriptors of the server"] = len(os.listdir(f"/proc/{server}/fd"))
        for helper in helpers:
            state["rooms ready"] = len(_children(helper))
            state["descriptors of the helper"] = len(os.listdir(f"/proc/{helper}/fd"))
            with open(f"/proc/{helper}/mountinfo") as file:
                state["mounts of the helper"] = len(file.readlines())
    return state


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def _resident_mib(pid: int | str) -> float:
    with open(f"/proc/{pid}/status") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    return round(kib / 1024, 1)


def run_mix(
    count: int, seed: int = 0, workers: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Score `count` hostile programs, drawn with replacement, and compare the machine before and after.

    Programs for which this machine lacks a layer are left out. A result with empty `leaked` and `unexpected`
    is the right one; memory is for the reader to judge (allocators keep a little).
    """
    draws = random.Random(seed)
    with Sandbox(workers=workers, timeout_s=0.5, memory_mib=512) as sandbox:
        assert sandbox._process is not None
        names = [name for name, hostile in HOSTILE.items() if can_be_held(sandbox, hostile)]
        scorer = Scorer(small_table(rows=60), sandbox)
        runner = VectorRunner([DataScience(scorer=scorer) for _ in range(BATCH)])
        runner.reset(seed=0)
        runner.step(["return 1", *(PROGRAM.format(c=1 + i) for i in range(BATCH - 1))])
        gc.collect()
        trainer_mib, server_mib = _resident_mib("self"), _resident_mib(sandbox._process.pid)
        before, start = state_of(sandbox), time.perf_counter()
        outcomes: Counter[str] = Counter()
        unexpected = []
        while (done := outcomes.total()) < count:
            chosen = [draws.choice(names) for _ in range(min(BATCH, count - done))]
            actions = [f"# {done + i}\n{HOSTILE[name].source}" for i, name in enumerate(chosen)]
            for name, transition in zip(chosen, runner.step(actions), strict=True):
                outcome = transition.info["outcome"]
                outcomes[outcome] += 1
                if outcome not in (*HOSTILE[name].outcomes, "timeout"):  # half a second may be too short
                    unexpected.append(
                        {"program": name, "outcome": outcome, "error": transition.info["error"]}
                    )
            tell(f"{outcomes.total()} of {count} programs")
        wall_s = time.perf_counter() - start
        gc.collect()
        after = state_of(sandbox)
        report = {
            "programs": count,
            "kinds": len(names),
            "left_out": sorted(set(HOSTILE) - set(names)),
            "outcomes": dict(outcomes.most_common()),
            "unexpected": unexpected,
            "before": before,
            "after": after,
            "leaked": {name: after[name] - before[name] for name in before if after[name] != before[name]},
            "trainer_mib": [trainer_mib, _resident_mib("self")],
            "server_mib": [server_mib, _resident_mib(sandbox._process.pid)],
            "wall_s": round(wall_s, 1),
            **about(sandbox),
        }
        folder = sandbox._folder
    if os.path.exists(folder):
        report["leaked"]["folder of the sandbox"] = 1
    return report
