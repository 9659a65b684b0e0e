"""What programs may read: five packages and what they need, wherever the interpreter keeps its packages."""

import os
from pathlib import Path

import numpy
import pytest
import sklearn
import torch

from etpo.envs.sandbox.box import readable


def shown() -> set[str]:
    return set(readable.readable([]).files())


def test_programs_see_their_packages_and_no_others() -> None:
    files = shown()
    for package in (numpy, sklearn):
        assert os.path.realpath(package.__file__) in files, package.__name__
    assert os.path.realpath(os.__file__) in files
    assert os.path.realpath(torch.__file__) not in files
    assert not any("sklearn/datasets/data" in path for path in files)


def test_packages_in_the_library_s_own_folder_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an interpreter without a virtual environment: site-packages lies beneath the library."""
    library = str(Path(numpy.__file__).resolve().parents[2])
    monkeypatch.setattr(readable.sysconfig, "get_path", lambda name, vars: library)
    files = shown()
    assert os.path.realpath(numpy.__file__) in files
    assert os.path.realpath(torch.__file__) not in files
