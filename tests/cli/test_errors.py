"""Everything that people get wrong is one line on stderr and an exit code, before anything slow starts."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from etpo.cli.errors import exit_code_of, message_of
from etpo.engine.models.places import ModelError
from etpo.engine.opening import is_disk_full
from etpo.engine.run_folder import RunFolderError
from etpo.envs.datasets import DatasetError, UnknownDataset

CSV = "a,b,y\n" + "".join(f"{i},{i * i % 7},{i % 2}\n" for i in range(40))


def the_line(result) -> str:
    """The one line on stderr; anything else fails the test."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.stdout
    return lines[0]


def unknown_data_set(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--dataset", "tic-tac-to"], 2, "tic-tac-toe"


def missing_file(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--dataset", tmp / "absent.csv", "--target", "y"], 1, "absent.csv"


def csv_without_target_option(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    (tmp / "t.csv").write_text(CSV)
    return ["--dataset", tmp / "t.csv"], 2, "--target"


def csv_without_the_target(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    (tmp / "t.csv").write_text(CSV)
    return ["--dataset", tmp / "t.csv", "--target", "yy"], 1, "'y'"


def target_with_one_class(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    (tmp / "t.csv").write_text("a,y\n" + "1,0\n" * 9)
    return ["--dataset", tmp / "t.csv", "--target", "y"], 1, "'y'"


def offline_kaggle_set(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--dataset", "spaceship-titanic"], 1, str(tmp / "home" / "spaceship-titanic")


def model_without_tokenizer(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    shutil.copytree(model, tmp / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    return ["--model", tmp / "m"], 1, "tokenizer"


def model_without_weights(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    shutil.copytree(model, tmp / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    return ["--env", "etpo/GridWorld-v0", "--model", tmp / "m"], 1, "safetensors"


def no_model(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--env", "etpo/GridWorld-v0", "--model", tmp / "nowhere"], 1, "nowhere"


def no_environment(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--env", "etpo/NoWorld-v0", "--model", model], 2, "etpo/NoWorld-v0"


def no_reflection_where_there_is_none(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--env", "etpo/GridWorld-v0", "--no-reflection", "--model", model], 2, "--no-reflection"


def infill_without_its_tokens(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    options: list[object] = ["--prompt-form", "infill", "--model", model, "--max-new-tokens", "4"]
    return [*options, "--env", "etpo/GridWorld-v0"], 2, "fill-in-the-middle"


def agent_with_etpo(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--agent", "openai:gpt-4"], 2, "--algo reflection"


def beta_0(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--beta", "0"], 2, "--beta: expected a finite number > 0"


def steps_0(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--steps", "0"], 2, "--steps: expected a number ≥ 1"


def steps_no_number(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--steps", "many"], 2, "'many'"


def unknown_option(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--stepz", "3"], 2, "--steps"


def unknown_choice(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--q-form", "logit"], 2, "'logits'"


def unknown_key_in_config(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    (tmp / "c.toml").write_text("step = 3\n")
    return ["--config", tmp / "c.toml"], 2, "did you mean 'steps'"


def absent_config(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--config", tmp / "c.toml"], 2, "c.toml"


def resume_of_nothing(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--resume", tmp / "run"], 1, "no such folder"


def resume_with_other_options(tmp: Path, model: Path) -> tuple[list[object], int, str]:
    return ["--resume", tmp / "run", "--steps", "9", "--beta", "1"], 2, "got --beta"


@pytest.mark.parametrize(
    "wrong",
    [
        unknown_data_set, missing_file, csv_without_target_option, csv_without_the_target,
        target_with_one_class, offline_kaggle_set, model_without_tokenizer, model_without_weights, no_model,
        no_environment, no_reflection_where_there_is_none, infill_without_its_tokens, agent_with_etpo,
        beta_0, steps_0, steps_no_number, unknown_option, unknown_choice,
        unknown_key_in_config, absent_config, resume_of_nothing, resume_with_other_options,
    ],
)  # fmt: skip
def test_wrong_use_of_train_is_one_line_and_leaves_nothing(
    cli, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable
) -> None:
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")  # a port of this machine that nobody listens on
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "none")
    monkeypatch.chdir(tmp_path)
    options, code, said = wrong(tmp_path, tiny_folder)
    out = [] if "--resume" in options else ["--out", tmp_path / "out"]
    result = cli("train", *options, *out)
    assert result.exit_code == code, result.output
    assert said in the_line(result)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_cannot_be_written(cli, tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "file").write_text("")
    result = cli("train", *quick, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert "Not a directory" in the_line(result)


def test_an_output_folder_with_files_in_it(cli, tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    result = cli("train", *quick, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--resume" in the_line(result)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["score", "absent.py", "--dataset", "wine"], 1, "absent.py"),
        (["score", "program.py"], 2, "--dataset"),
        (["score", "program.py", "--dataset", "wien"], 2, "wine"),
        (["sample", "absent"], 1, "absent"),
        (["sample", "."], 1, "neither"),
        (["eval", "absent"], 1, "no such folder"),
        (["eval", "."], 1, "config.toml"),
        (["export", "absent", "--out", "x"], 1, "no such folder"),
        (["data", "path", "wine"], 1, "built in"),
        (["data", "get", "wien"], 2, "wine"),
        (["data", "path", "pharyngitis"], 1, "etpo data get pharyngitis"),
        (["data", "get", "pharyngitis"], 1, "Kaggle yoshifumimiya/pharyngitis (no connection"),
        (["data", "check", "wien"], 2, "wine"),
        (["data", "check", "wien:synthetic"], 2, "wine"),
        (["data", "path", "wine:synthetic"], 1, "built in"),
        (["data", "lst"], 2, "'list'"),
        (["score", "program.py", "--dataset", "wine", "--timeout-s", "inf"], 2, "at most 86400, got inf"),
        (["bench", "sandbox", "--seconds", "0"], 2, "--seconds"),
        (["bench", "learning", "--rows", "q form residul"], 2, "did you mean 'q form residual'"),
        (["export", "program.py", "--out", "x"], 1, "no such folder"),
        (["pretrain", "--out", "program.py"], 2, "got a file"),
        (["pretrain", "--out", "program.py/x"], 1, "Not a directory"),
        (["pretrain"], 2, "--out"),
        (["pretrain", "--out", "."], 2, "empty"),
    ],
)
def test_wrong_use_of_the_other_commands(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")  # a port of this machine that nobody listens on
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text("return None\n")
    result = cli(*words)
    assert result.exit_code == code, result.output
    assert said in the_line(result)


def test_the_script_says_it_in_one_line_and_with_debug_shows_the_traceback(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("etpo")

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    short = run("train", "--beta", "0")
    assert short.returncode == 2
    assert short.stderr.count("\n") == 1
    long = run("--debug", "train", "--beta", "0")
    assert long.returncode == 2
    assert "Traceback" in long.stderr


def test_whoever_stops_reading_gets_no_complaint() -> None:
    script = Path(sys.executable).with_name("etpo")
    read, write = os.pipe()
    os.close(read)
    told = subprocess.run(
        [script, "data", "list"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (told.returncode, told.stderr) == (1, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2), (ModelError("x"), 1), (OSError(errno.EACCES, "no"), 1), (KeyError("x"), 1),
        (RunFolderError("x", usage=True), 2), (RunFolderError("x", usage=False), 1),
        (DatasetError("x"), 1), (UnknownDataset("x"), 2), (click.UsageError("x"), 2),
        (click.ClickException("x"), 1),
    ],
)  # fmt: skip
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code


def test_an_error_that_nobody_foresaw_is_named_and_says_how_to_see_more() -> None:
    line = message_of(RuntimeError("two\nlines"))
    assert "unexpected RuntimeError: two lines" in line
    assert "--debug" in line
    assert "\n" not in line


def test_a_full_disk_is_known_whoever_reports_it() -> None:
    from safetensors import SafetensorError

    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
