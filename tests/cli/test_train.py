"""`etpo train` end to end on a tiny model and an instant environment."""

import dataclasses
import errno
import fcntl
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from etpo.cli.pretrain import lines_of
from etpo.cli.progress import Clock, PlainLines, figures
from etpo.cli.train import train as command
from etpo.engine.config import Config


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_field_is_an_option_with_its_default_and_help() -> None:
    options = {p.name: p for p in command.params if isinstance(p, click.Option)}
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    assert set(options) == set(fields) | {"config_file", "resume"}
    for name, default in fields.items():
        assert options[name].default == default, name
        assert options[name].help
        assert options[name].opts == ["--" + name.replace("_", "-")]


def test_flag_before_config_before_preset_before_default(cli, tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "c.toml").write_text('gamma = 0.5\nbeta = 0.2\npreset = "paper"\n')
    result = cli(
        "train", *quick, "--config", tmp_path / "c.toml", "--beta", "0.3", "--steps", "8",
        "--algo", "reflection", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert kept["beta"] == 0.3  # flag over file
    assert kept["gamma"] == 0.5  # file over preset
    assert kept["optimizer"] == "lion"  # preset over default
    assert kept["timeout_s"] == 10.0  # default


def test_a_run_leaves_its_records_and_says_what_was_learned(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    result = cli("train", *quick, "--steps", "40", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    programs, metrics = read(out / "programs.jsonl"), read(out / "metrics.jsonl")
    assert [p["step"] for p in programs] == list(range(1, 41))
    assert [m["step"] for m in metrics] == [16, 32, 40]
    ran = sum(p["auc_mean"] is not None for p in programs[:20])
    assert f"First 20: {ran / 20:.0%} ran" in result.stdout
    best = max(p["auc_mean"] for p in programs if p["auc_mean"] is not None)
    assert f"Best program: AUC {best:.4f} ± 0.0100" in result.stdout
    assert f"Report: {out / 'report.html'}" in result.stdout
    assert "<svg" in (out / "report.html").read_text()


def test_resume_goes_on_and_rewrites_the_configuration(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    assert cli("train", *quick, "--steps", "16", "--out", out).exit_code == 0
    result = cli("train", "--resume", out, "--steps", "32")
    assert result.exit_code == 0, result.output
    assert [p["step"] for p in read(out / "programs.jsonl")] == list(range(1, 33))
    assert tomllib.loads((out / "config.toml").read_text())["steps"] == 32


def test_resume_with_less_than_was_done_is_refused_and_changes_nothing(cli, tmp_path: Path, quick) -> None:
    out = tmp_path / "run"
    assert cli("train", *quick, "--steps", "32", "--out", out).exit_code == 0
    before = (out / "config.toml").read_text()
    result = cli("train", "--resume", out, "--steps", "20")
    assert result.exit_code == 2
    assert "--steps: expected at least 32" in result.stderr
    assert (out / "config.toml").read_text() == before


def test_resume_says_where_it_goes_on(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    assert cli("train", *quick, "--steps", "16", "--out", out).exit_code == 0
    assert "Goes on from program 16." in cli("train", "--resume", out, "--steps", "32").stdout


def test_a_data_set_beside_an_environment_is_refused(cli, tmp_path: Path, quick: list[str]) -> None:
    result = cli("train", *quick, "--dataset", "wine", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "leave one of them out" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_hub_without_a_network_is_said_at_once(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = cli("train", "--model", "nobody/none", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE is set" in result.stderr
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    result = cli("train", "--model", "nobody/none", "--out", tmp_path / "run")
    assert "expected the Hugging Face hub to answer, got ConnectionError" in result.stderr
    assert "--model FOLDER" in result.stderr


def test_threads_do_not_spin() -> None:
    code = "import etpo.cli.main, os; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n"


def test_the_numbers_of_pretraining_are_told_also_where_they_are_nested() -> None:
    lines = lines_of(
        {"tokens": 30000, "loss": 1.23456, "programs": {"run": 0.5, "by": {"n": 3}}, "seed": "x"}
    )
    assert [line.split() for line in lines] == [
        ["tokens", "30,000"], ["loss", "1.235"], ["programs", "run", "0.5"], ["programs", "by", "n", "3"],
        ["seed", "x"],
    ]  # fmt: skip


def test_a_run_that_is_written_to_is_not_resumed_by_another(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    assert cli("train", *quick, "--steps", "16", "--out", out).exit_code == 0
    before = (out / "config.toml").read_text()
    fd = os.open(out, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    result = cli("train", "--resume", out, "--steps", "32")
    assert result.exit_code == 1
    assert "another `etpo train` is writing to" in result.stderr
    assert (out / "config.toml").read_text() == before
    os.close(fd)
    assert cli("train", "--resume", out, "--steps", "32").exit_code == 0


def test_ctrl_c_saves_reports_and_says_how_to_go_on(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    quick[1] = "letters_env:Interrupting"
    result = cli("train", *quick, "--steps", "80", "--out", out)
    assert result.exit_code == 130, result.output
    assert f"--resume {out}" in result.stderr
    assert (out / "report.html").is_file()
    assert [m["step"] for m in read(out / "metrics.jsonl")] == [16, 32]  # the iteration was finished
    again = cli("train", "--resume", out)
    assert again.exit_code == 0, again.output
    assert read(out / "metrics.jsonl")[-1]["step"] == 80


def test_a_second_ctrl_c_stops_at_once(cli, tmp_path: Path, quick: list[str], monkeypatch) -> None:
    module = importlib.import_module("letters_env")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Letters, "step", stop)
    result = cli("train", *quick, "--steps", "80", "--out", tmp_path / "run")
    assert result.exit_code == 130, result.output
    assert f"--resume {tmp_path / 'run'}" in result.stderr  # the checkpoint of step 0


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    cli, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from etpo.engine import progress

    save, out = progress.save_checkpoint, tmp_path / "run"

    def full(folder, checkpoint):
        if checkpoint.step > 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, checkpoint)

    monkeypatch.setattr(progress, "save_checkpoint", full)
    result = cli("train", *quick, "--steps", "48", "--checkpoint-every", "16", "--out", out)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"--resume {out}" in result.stderr
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    assert cli("train", "--resume", out).exit_code == 0
    assert [p["step"] for p in read(out / "programs.jsonl")] == list(range(1, 49))


def metrics_at(step: int, wall_s: float) -> dict:
    return {
        "step": step, "wall_s": wall_s, "reward_mean": 0.5, "kl_ref": -1e-9, "runnable_share": 0.25,
        "auc_best": None, "tokens_per_s": 1234.0,
    }  # fmt: skip


def test_time_left_counts_from_where_a_resumed_run_began() -> None:
    new, resumed = Clock(100, resumed=False), Clock(100, resumed=True)
    assert new.left_s(metrics_at(20, 10.0)) == pytest.approx(40.0)
    assert resumed.left_s(metrics_at(60, 10.0)) is None
    assert resumed.left_s(metrics_at(80, 12.0)) == pytest.approx(2.0)


def test_figures_show_a_dash_for_what_there_is_not_and_no_minus_zero() -> None:
    assert figures(metrics_at(1, 1.0), on_data=True) == [
        ("reward", "0.500"), ("runnable", "25%"), ("best AUC", "–"), ("KL", "0.000"), ("tokens/s", "1,234"),
    ]  # fmt: skip
    assert "best AUC" not in dict(figures(metrics_at(1, 1.0), on_data=False))


def test_a_long_run_prints_few_lines(capsys) -> None:
    view = PlainLines(Config(steps=10_000), "title", Clock(10_000, resumed=False))
    with view:
        for step in range(10, 10_001, 10):
            view(metrics_at(step, step / 10))
    assert 20 <= len(capsys.readouterr().out.splitlines()) <= 22
