"""How many split processes, and how many whole programs, the sandbox runs in a second."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from etpo.engine.config import Config
from etpo.engine.machine import machine
from etpo.envs.datasets import Dataset
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Scorer, make_split

PROGRAM = """\
def build_model(x_train, y_train):
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression(C={c}).fit(x_train, y_train)
"""


def small_table(rows: int = 500, features: int = 9) -> Dataset:
    """A two-class table whose halves are 250×9, as the goal names it."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(rows, features))
    y = (x[:, 0] + x[:, 1] * x[:, 2] + draws.normal(size=rows) > 0).astype(np.int64)
    return Dataset("small", x, y, tuple(f"f{i}" for i in range(features)), ("0", "1"), "generated", True)


def measure(workers: int | None = None, seconds: float = 3.0, repeats: int = 3) -> dict[str, Any]:
    """Median and range, over `repeats` rounds of about `seconds` each, of splits and programs a second.

    A split is one LogisticRegression on 250×9 in its own process; a program is five of them, scored, and
    audited as often as in a run. No program is asked for twice, so that nothing comes from memory.
    """
    table = small_table()
    with Sandbox(workers=workers) as sandbox:
        scorer = Scorer(table, sandbox, audit_share=Config.audit_share)
        arrays = make_split(table, 0).arrays
        serial = iter(range(10**9))

        def splits(count: int) -> None:
            results = sandbox.run((PROGRAM.format(c=1 + next(serial)), arrays, 0) for _ in range(count))
            assert all(result.outcome == "ok" for result in results)

        def programs(count: int) -> None:
            scores = scorer.score_many([PROGRAM.format(c=1 + next(serial)) for _ in range(count)])
            assert all(score.outcome == "ok" for score in scores)

        splits(10)
        return {
            "splits_per_s": _rate(splits, 40, seconds, repeats),
            "programs_per_s": _rate(programs, 8, seconds, repeats),
            **about(sandbox),
        }


def about(sandbox: Sandbox) -> dict[str, Any]:
    """Where a measurement was made: the layers in force, the machine and how busy it is."""
    layers = sandbox.layers()
    return {
        "workers": sandbox.workers,
        "layers_in_force": layers.in_force,
        "layers_missing": layers.missing,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release(),
        **machine("scikit-learn"),
    }


def _rate(work: Callable[[int], None], batch: int, seconds: float, repeats: int) -> dict[str, float]:
    rates = []
    for _ in range(repeats):
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            work(batch)
            done += batch
        rates.append(done / elapsed)
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
