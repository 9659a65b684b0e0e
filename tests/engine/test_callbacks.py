"""Who looks on while a run trains: callbacks in Python, and trackers by their own packages, read back."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

import etpo
from etpo.engine.loggers import LoggerMissing, loggers_of, read_ids
from etpo.engine.run_folder import read_records
from etpo.envs.text_space import AnyText


def config_of(model: Path, steps: int = 12, **more) -> etpo.Config:
    return etpo.Config(
        env="etpo/GridWorld-v0", model=str(model), steps=steps, envs=4, rollout_steps=1, max_new_tokens=4,
        updates_per_batch=1, threads=1, algo="rloo", **more,
    )  # fmt: skip


class Notes(etpo.Callback):
    def __init__(self):
        self.heard = []

    def on_start(self, config, folder):
        self.heard.append(("start", config.steps, (folder / "config.toml").exists()))

    def on_iteration(self, metrics):
        self.heard.append(("iteration", metrics["step"]))

    def on_end(self, outcome):
        self.heard.append(("end", None if outcome is None else outcome.step))


def test_callbacks_hear_of_start_iterations_and_end(tiny_folder, tmp_path):
    notes, steps = Notes(), []
    etpo.train(config_of(tiny_folder), tmp_path / "run", callbacks=[notes, lambda m: steps.append(m["step"])])
    assert notes.heard == [("start", 12, True), *(("iteration", n) for n in (4, 8, 12)), ("end", 12)]
    assert steps == [4, 8, 12]
    with pytest.raises(TypeError, match="give an instance"):
        etpo.train(config_of(tiny_folder), tmp_path / "other", callbacks=[Notes])


def test_a_callback_that_fails_ends_the_run_and_the_others_hear_of_it(tiny_folder, tmp_path):
    notes = Notes()

    def fail(metrics):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        etpo.train(config_of(tiny_folder), tmp_path / "run", callbacks=[notes, fail])
    assert notes.heard[-1] == ("end", None)
    assert len(read_records(tmp_path / "run" / "programs.jsonl")) == 4


class Echo(gymnasium.Env):
    observation_space = action_space = AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "say", {}

    def step(self, action):
        return "say", float(len(action)), True, False, {}


def test_an_environment_is_given_by_its_class(tiny_folder, tmp_path):
    etpo.train(config_of(tiny_folder), tmp_path / "run", env=Echo)
    rewards = [(len(p["text"]), p["reward"]) for p in read_records(tmp_path / "run" / "programs.jsonl")]
    assert all(length == reward for length, reward in rewards)


def test_a_bar_is_shown_where_it_is_asked_for(tiny_folder, tmp_path, capsys):
    etpo.train(config_of(tiny_folder), tmp_path / "a", progress=True)
    assert "12/12" in capsys.readouterr().err
    etpo.train(config_of(tiny_folder), tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""


def test_public_names_are_listed_and_packages_are_there_without_an_import():
    assert {"Callback", "Config", "kernels", "envs", "train"} <= set(dir(etpo))
    assert etpo.kernels.linear_kl is not None


def test_log_names_are_checked_and_tensorboard_can_be_left_out(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        etpo.Config(log="wanbd")
    etpo.train(config_of(tiny_folder, log="none"), tmp_path / "a")
    assert not (tmp_path / "a" / "tensorboard").exists()
    etpo.train(config_of(tiny_folder, log="tensorboard"), tmp_path / "b")
    assert list((tmp_path / "b" / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch, tiny_folder):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(LoggerMissing, match=r"pip install 'etpo\[log\]'"):
        loggers_of(config_of(tiny_folder, log="wandb"))


def run_twice(tiny_folder: Path, folder: Path, tracker: str) -> list[dict]:
    """A run that stops and goes on; returns its metrics."""
    etpo.train(config_of(tiny_folder, 8, log=tracker), folder)
    first = read_ids(folder)[tracker]
    etpo.train(config_of(tiny_folder, 12, log=tracker), folder, resume=True)
    assert read_ids(folder)[tracker] == first
    return read_records(folder / "metrics.jsonl")


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-home"))
    (tmp_path / "wandb-home").mkdir()
    metrics = run_twice(tiny_folder, tmp_path / "run", "wandb")
    read: dict[int, dict] = {}
    for file in sorted((tmp_path / "wandb-home").rglob("*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                read[row["_step"]] = row
    assert sorted(read) == [4, 8, 12]
    for line in metrics:
        assert read[line["step"]]["reward_mean"] == pytest.approx(line["reward_mean"])


def test_mlflow_in_a_file(tiny_folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    metrics = run_twice(tiny_folder, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    run_id = read_ids(tmp_path / "run")["mlflow"]
    read = {m.step: m.value for m in client.get_metric_history(run_id, "reward_mean")}
    assert read == {line["step"]: pytest.approx(line["reward_mean"]) for line in metrics}
    run = client.get_run(run_id)
    assert run.data.params["algo"] == "rloo"
    assert run.info.status == "FINISHED"


def test_trackio_on_this_machine(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    metrics = run_twice(tiny_folder, tmp_path / "run", "trackio")
    (run,) = trackio.Api().runs("etpo")
    assert run.name == "run"
    from trackio.sqlite_storage import SQLiteStorage

    read = {row["step"]: row["reward_mean"] for row in SQLiteStorage.get_logs("etpo", "run")}
    assert read == {line["step"]: pytest.approx(line["reward_mean"]) for line in metrics}


def test_only_finite_numbers_are_sent(tiny_folder):
    from etpo.engine.loggers import Logger

    class Sent(Logger):
        name, package = "sent", "json"

        def send(self, numbers, step):
            self.last = numbers, step

    sent = Sent()
    sent.on_iteration({"step": 3, "a": 1.5, "b": None, "c": math.nan, "stage": "train"})
    assert sent.last == ({"a": 1.5}, 3)
