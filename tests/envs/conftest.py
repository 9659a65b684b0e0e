"""Fixtures for the tests of environments: one warm sandbox, small tables."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from etpo.envs.datasets import Dataset
from etpo.envs.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    os.environ["ETPO_TEST_SECRET"] = "not for children"
    with Sandbox(workers=2, timeout_s=20.0, memory_mib=512) as box:
        yield box


@pytest.fixture(scope="session")
def small() -> Dataset:
    """Two classes, 60 rows, two features; the first tells the classes apart well but not wholly."""
    draws = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = draws.normal(size=(60, 2)) + y[:, None]
    return Dataset("small", x, y.astype(np.int64), ("a", "b"), ("0", "1"), "generated", True)


@pytest.fixture
def kaggle_home() -> Path:
    """A data home with the four Kaggle files; skips where there is none."""
    home = Path(os.environ.get("ETPO_DATA_HOME", "absent"))
    missing = [n for n in ("pharyngitis", "health_insurance", "kidney_stone", "spaceship_titanic")
               if not any((home / s).is_dir() for s in (n, n.replace("_", "-")))]  # fmt: skip
    if missing:
        pytest.skip(f"ETPO_DATA_HOME has no {', '.join(missing)}")
    return home
