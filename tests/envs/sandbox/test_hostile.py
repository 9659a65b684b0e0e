"""Hostile programs: each has its outcome and leaves nothing behind. See `etpo.bench.sandbox.hostile`."""

import os
import tempfile
from pathlib import Path

import pytest

from etpo.bench.sandbox.hostile import HOSTILE
from etpo.bench.sandbox.mix import can_be_held, run_mix, split_processes
from etpo.envs.sandbox import SplitArrays
from etpo.envs.scoring import Scorer
from tests.envs.programs import FIT, make_passable

# Of the mix; `etpo bench sandbox --hostile 500` runs more.
MIXED = 40


@pytest.fixture(scope="module")
def arrays(small):
    return SplitArrays(small.x[:30], small.y[:30], small.x[30:])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_has_its_outcome_and_does_no_harm(sandbox, arrays, name):
    hostile = HOSTILE[name]
    if not can_be_held(sandbox, hostile):
        pytest.skip(f"this machine lacks {', '.join(set(hostile.needs) & set(sandbox.layers().missing))}")
    server = sandbox._process.pid
    wait_s = 1.0 if "timeout" in hostile.outcomes else 60.0
    sandbox.submit(hostile.source, arrays, 0, wait_s)
    _, result = sandbox.wait()
    # A wrong answer is told from a right one by the scorer, not by the sandbox.
    expected = {*hostile.outcomes, *(["ok"] if "invalid_output" in hostile.outcomes else [])}
    assert result.outcome in expected, result.failure
    if hostile.nothing_works:
        assert result.stdout == "[]\n"
    assert split_processes(server) == []
    assert sandbox._process.pid == server
    assert sandbox.run([(FIT, arrays, 0)])[0].outcome == "ok"
    assert list(Path("/").glob("*/etpo-was-here")) == []


def test_answers_that_are_none_are_invalid(sandbox, small):
    scorer = Scorer(small, sandbox, split_seeds=(0,), timeout_s=60.0)
    names = [name for name, hostile in HOSTILE.items() if "invalid_output" in hostile.outcomes]
    scores = scorer.score_many([HOSTILE[name].source for name in names])
    assert len(names) > 8
    for name, score in zip(names, scores, strict=True):
        assert score.outcome in HOSTILE[name].outcomes, (name, score)


def test_a_mix_of_hostile_programs_leaks_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "boxes"
    folder.mkdir()
    make_passable(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    report = run_mix(MIXED, workers=2)
    assert report["leaked"] == {}
    assert report["unexpected"] == []
    assert sum(report["outcomes"].values()) == MIXED
    # Allocators keep a little; a leak of one answer or of one program's pages would be far more.
    for before_mib, after_mib in (report["trainer_mib"], report["server_mib"]):
        assert after_mib - before_mib < 9
    assert os.listdir(folder) == []
