"""`etpo.train` opens a run as the command does: checked first, locked, and tidied up."""

import fcntl
import os
import tomllib

import pytest

import etpo
from etpo.engine.config import Config
from etpo.engine.models.places import ModelError
from etpo.engine.run_folder import RunFolderError


def config_of(model, **changes) -> Config:
    settings = {
        "env": "etpo/GridWorld-v0", "model": str(model), "steps": 8, "envs": 4, "max_new_tokens": 4,
        "threads": 1, "algo": "reflection",
    }  # fmt: skip
    return Config(**(settings | changes))


def test_a_folder_that_is_written_to_is_not_opened(tiny_folder, tmp_path):
    etpo.train(config_of(tiny_folder), tmp_path / "run")
    kept = (tmp_path / "run" / "config.toml").read_text()
    fd = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(RunFolderError, match="is writing to") as raised:
        etpo.train(config_of(tiny_folder, steps=16), tmp_path / "run", resume=True)
    os.close(fd)
    assert isinstance(raised.value, etpo.EtpoError)
    assert raised.value.exit_code == 1
    assert (tmp_path / "run" / "config.toml").read_text() == kept
    assert etpo.train(config_of(tiny_folder, steps=16), tmp_path / "run", resume=True).step == 16
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["steps"] == 16


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="expected a tokenizer"):
        etpo.train(config_of(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_new_folder_that_nothing_was_saved_in_is_taken_away(tmp_path):
    with pytest.raises(ModelError):
        etpo.train(config_of(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_s_path_is_kept_absolute(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    etpo.train(config_of(tiny_folder.name), tmp_path / "run")
    kept = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert kept["model"] == str(tiny_folder)
    assert kept["out"] == str(tmp_path / "run")
