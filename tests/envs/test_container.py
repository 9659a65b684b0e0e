"""`--runner docker:IMAGE`: what is run, what is said where no engine is, and scores as without it.

The engine is a script named `docker` on PATH: it notes its arguments and starts what stands behind the image.
"""

import json
import os
import sys

import pytest
from click.testing import CliRunner

from etpo.cli.main import main
from etpo.envs.container import Container, check_engine, command_of
from etpo.envs.remote import open_runner
from etpo.envs.sandbox import SandboxError
from etpo.envs.scoring import Scorer

PROGRAM = """from sklearn.linear_model import LogisticRegression
return LogisticRegression().fit(x_train, y_train)
"""
ETPO = f"{sys.executable} -P -c 'from etpo.cli.main import main; main()'"
ENGINE = """#!/bin/sh
echo "$@" >> "{notes}"
[ "$1" = info ] && {info}
while [ "$1" != a-box ]; do shift; done
shift 2
{run}
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    def make(info="exit 0", run=f'exec {ETPO} "$@"'):
        script = tmp_path / "bin" / "docker"
        script.parent.mkdir(exist_ok=True)
        script.write_text(ENGINE.format(notes=tmp_path / "notes", info=info, run=run))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        return tmp_path / "notes"

    return make


def test_programs_score_in_a_container_as_here(small, sandbox, engine):
    notes = engine()
    runner = open_runner("docker:a-box")
    try:
        there = Scorer(small, runner).score_many([PROGRAM, "return 1 / 0\n"])
    finally:
        runner.close()
    here = Scorer(small, sandbox).score_many([PROGRAM, "return 1 / 0\n"])
    assert [(s.outcome, s.auc_splits, s.error) for s in there] == [
        (s.outcome, s.auc_splits, s.error) for s in here
    ]
    assert [s.outcome for s in there] == ["ok", "error"]
    asked = notes.read_text().splitlines()
    assert asked == ["info", " ".join(command_of("docker", "a-box", "default", runner.workers)[1:])]


def test_the_command_has_no_network_no_rights_and_limits():
    said = " ".join(command_of("podman", "a-box", "strict", 4))
    for part in ("--network none", "--read-only", "--cap-drop ALL --user 65534:65534",
                 "--memory 11264m --memory-swap 11264m",
                 "--cpus 4", "a-box etpo serve-sandbox --stdio --sandbox strict"):  # fmt: skip
        assert part in said
    assert "--publish" not in said


def test_without_an_engine_it_is_one_line(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="expected the command podman, got none on PATH; install it"):
        check_engine("podman")


def test_a_daemon_that_does_not_answer_is_one_line_before_a_run_begins(engine, tmp_path):
    engine(info='{ echo "Cannot connect to the daemon" >&2; exit 1; }')
    arguments = ["train", "--runner", "docker:a-box", "--out", str(tmp_path / "run")]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code != 0
    assert "expected docker to answer `docker info`, got: Cannot connect to the daemon; start" in said.output
    assert "--runner local" in said.output
    assert not (tmp_path / "run").exists()


def test_an_image_that_does_not_serve_is_one_line(engine):
    engine(run='echo "exec: etpo: not found" >&2; exit 127')
    with pytest.raises(SandboxError, match="programs at docker:a-box, got: exec: etpo: not found"):
        open_runner("docker:a-box")


def test_a_container_that_is_late_is_ended(engine):
    engine(run="exec sleep 60")
    container = Container("docker", "a-box")
    with pytest.raises(OSError):
        container.ask(b"", 0.2)
    container.close()


@pytest.mark.parametrize("where", ["docker:", "docker:--privileged", "elsewhere", "ftp://host"])
def test_what_is_no_runner_is_one_line(where):
    with pytest.raises(ValueError, match="expected local, http://HOST:PORT, docker:IMAGE or podman:IMAGE"):
        open_runner(where)


def test_the_sandbox_is_not_off_in_a_container():
    with pytest.raises(ValueError, match="--sandbox off: expected strict or default"):
        open_runner("docker:a-box", "off")


def test_an_environment_that_takes_no_runner_says_so(tmp_path, engine):
    engine()
    arguments = [
        "train",
        "--env",
        "etpo/GridWorld-v0",
        "--runner",
        "docker:a-box",
        "--out",
        str(tmp_path / "run"),
    ]
    assert "expected an environment with a `runner` parameter" in CliRunner().invoke(main, arguments).output


def test_training_uses_the_runner(engine, tmp_path):
    notes = engine()
    arguments = [
        "train", "--runner", "docker:a-box", "--algo", "reflection", "--steps", "2", "--envs", "2",
        "--log", "none", "--rollout-steps", "1", "--audit-share", "0", "--max-new-tokens", "8",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("run ") for line in notes.read_text().splitlines()) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "programs.jsonl").read_text().splitlines()]
    assert len(rows) == 2
