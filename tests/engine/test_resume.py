"""Runs that stop, are killed, or lose a checkpoint go on bit for bit."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch

from etpo.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from etpo.engine.config import Config
from etpo.engine.loop import train
from etpo.engine.models.prompt_form import encoded
from etpo.engine.run_folder import RunFolder, read_records
from etpo.envs.text_space import AnyText

VOLATILE = {"wall_s", "tokens_per_s", "rss_mib"}


def config_of(model: Path, steps: int, **overrides) -> Config:
    settings = {
        "env": "etpo/GridWorld-v0", "model": str(model), "steps": steps, "envs": 4, "rollout_steps": 2,
        "max_new_tokens": 6, "replay_capacity": 16, "minibatch": 8, "updates_per_batch": 2, "threads": 1,
        "checkpoint_every": 16,
    }  # fmt: skip
    return Config(**(settings | overrides))


def run(path: Path, config: Config, *, resume: bool = False):
    folder = RunFolder(path) if resume else RunFolder.create(path, config)
    return train(config, folder, resume=resume)


def left_behind(path: Path):
    """Weights, moments, buffer and records, without what the clock decides."""
    checkpoint, damaged = latest_checkpoint(path / "checkpoints")
    assert checkpoint is not None
    assert not damaged
    strip = lambda records: [{k: v for k, v in r.items() if k not in VOLATILE} for r in records]  # noqa: E731
    state = {k: v for k, v in checkpoint.state.items() if k not in VOLATILE | {"sizes"}}
    records = [strip(read_records(path / name)) for name in ("metrics.jsonl", "programs.jsonl")]
    return checkpoint.tensors, json.dumps(state, sort_keys=True), records


def assert_same_run(a: Path, b: Path) -> None:
    (tensors_a, state_a, records_a), (tensors_b, state_b, records_b) = left_behind(a), left_behind(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert tensor.equal(tensors_b[name]), name
    assert state_a == state_b
    assert records_a == records_b


@pytest.mark.parametrize(("algo", "roles", "first"), [
    ("etpo", "full", 24), ("etpo", "lora", 21), ("etpo-q", "full", 24), ("etpo-q", "full", 21),
    ("etpo-q", "lora", 21), ("ppo-kl", "full", 21), ("rloo", "full", 24), ("grpo", "full", 24),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_run(tiny_folder, tmp_path, algo, roles, first):
    """48 steps = `first` + resume + the rest; 21 ends inside an iteration, which is then run again whole."""
    run(tmp_path / "a", config_of(tiny_folder, 48, algo=algo, roles=roles))
    outcome = run(tmp_path / "b", config_of(tiny_folder, first, algo=algo, roles=roles))
    assert outcome.step == first
    assert len(read_records(tmp_path / "b" / "programs.jsonl")) == first
    run(tmp_path / "b", config_of(tiny_folder, 48, algo=algo, roles=roles), resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_learning_moves_the_policy(tiny_folder, tmp_path):
    """Guards the test above: two runs that never learn would be equal too."""
    run(tmp_path / "a", config_of(tiny_folder, 32))
    tensors, _, _ = left_behind(tmp_path / "a")
    before = latest_checkpoint_at(tmp_path / "a", 0)
    name = "policy/model.layers.0.mlp.up_proj.weight"
    assert not tensors[name].equal(before[name])


def latest_checkpoint_at(path: Path, step: int):
    return load_checkpoint(path / "checkpoints" / f"step-{step:06d}").tensors


def cut(weights: bytes) -> bytes:
    return weights[:-100]


def with_a_wrong_bit(weights: bytes) -> bytes:
    """A file of safetensors that loads, with another number somewhere."""
    return weights[:-100] + bytes([weights[-100] ^ 1]) + weights[-99:]


@pytest.mark.parametrize("damaged", [cut, with_a_wrong_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny_folder, tmp_path, damaged):
    run(tmp_path / "a", config_of(tiny_folder, 48))
    run(tmp_path / "b", config_of(tiny_folder, 40))
    newest = list_checkpoints(tmp_path / "b" / "checkpoints")[-1]
    weights = newest / "state.safetensors"
    weights.write_bytes(damaged(weights.read_bytes()))
    outcome = run(tmp_path / "b", config_of(tiny_folder, 48), resume=True)
    assert len(outcome.notes) == 1
    assert str(newest) in outcome.notes[0]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_without_a_usable_checkpoint_a_run_is_left_as_it_is(tiny_folder, tmp_path):
    run(tmp_path / "a", config_of(tiny_folder, 16))
    for checkpoint in list_checkpoints(tmp_path / "a" / "checkpoints"):
        (checkpoint / "state.json").write_text("{}")
    before = contents(tmp_path / "a")
    assert {"metrics.jsonl", "programs.jsonl", "config.toml"} <= {path.name for path in before}
    with pytest.raises(CheckpointError, match="got none that is usable"):
        run(tmp_path / "a", config_of(tiny_folder, 32), resume=True)
    assert contents(tmp_path / "a") == before


def contents(path: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_resuming_inside_an_iteration_again_and_again_keeps_the_whole_checkpoint(tiny_folder, tmp_path):
    run(tmp_path / "a", config_of(tiny_folder, 17))
    for steps in (18, 19, 20):
        run(tmp_path / "a", config_of(tiny_folder, steps), resume=True)
    checkpoint, _ = latest_checkpoint(tmp_path / "a" / "checkpoints", whole=True)
    assert checkpoint is not None
    assert checkpoint.step == 16
    run(tmp_path / "a", config_of(tiny_folder, 24), resume=True)
    assert len(list_checkpoints(tmp_path / "a" / "checkpoints")) == 3


def test_a_checkpoint_of_another_model_is_refused(tiny_folder, tmp_path):
    run(tmp_path / "a", config_of(tiny_folder, 8))
    with pytest.raises(CheckpointError, match="of another model or form of roles"):
        run(tmp_path / "a", config_of(tiny_folder, 16, roles="lora"), resume=True)
    assert len(read_records(tmp_path / "a" / "programs.jsonl")) == 8


def test_the_checkpoint_just_written_is_kept_and_later_steps_come_last(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001, 7):
        save_checkpoint(tmp_path, Checkpoint(step, {"x": torch.zeros(1)}, {"whole": True}))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [7, 1_000_000, 1_000_001]


class Forgetful(gymnasium.Env):
    """An environment without `state_dict`, in the middle of an episode of five steps."""

    observation_space = action_space = AnyText()
    n_resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Forgetful.n_resets += 1
        self.t = 0
        return f"reset {self.n_resets}", {}

    def step(self, action):
        self.t += 1
        return f"step {self.t}", 0.0, False, self.t == 5, {}


def test_an_environment_without_a_state_starts_a_new_episode(tiny_folder, tmp_path):
    """Its first state is what the policy answers, and no trace runs from the old episode into it."""
    settings = {"env": f"{__name__}:Forgetful", "envs": 2, "rollout_steps": 3}
    run(tmp_path / "a", config_of(tiny_folder, 6, **settings))
    run(tmp_path / "a", config_of(tiny_folder, 12, **settings), resume=True)
    records = read_records(tmp_path / "a" / "programs.jsonl")
    assert [(r["episode"], r["t"]) for r in records if r["env"] == 0] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip
    assert [r["prompt"] for r in records[6:8]] == [
        f"reset {Forgetful.n_resets - 1}", f"reset {Forgetful.n_resets}",
    ]  # fmt: skip


def test_an_empty_state_is_read_as_a_stop_token():
    """Tokenizers such as GPT-2's and Qwen's put no start token before a text."""
    form: Any = SimpleNamespace(encode=lambda state, room: [9] * len(state), stop_token=1)
    assert [encoded(form, state, 99) for state in ("abc", "")] == [[9, 9, 9], [1]]


def test_more_new_tokens_than_the_context_holds_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="--max-new-tokens: expected at most 112, as"):
        run(tmp_path / "a", config_of(tiny_folder, 8, max_new_tokens=113))


def start_child(path: Path, config: Config) -> BaseProcess:
    """A run in a process of its own, resumed where the folder has one; forked from a warm server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["etpo.engine.loop"])
    folder = RunFolder(path) if (path / "config.toml").exists() else RunFolder.create(path, config)
    child = context.Process(target=train, args=(config, folder), kwargs={"resume": True})
    child.start()
    return child


def test_killed_at_random_moments_it_resumes(tiny_folder, tmp_path):
    """SIGKILL at 20 random moments of one run; in the end it is the uninterrupted run."""
    config = config_of(tiny_folder, 320)
    run(tmp_path / "a", config)
    rng = random.Random(0)
    for _ in range(20):
        child = start_child(tmp_path / "b", config)
        wait_for_progress(tmp_path / "b", child)
        time.sleep(rng.uniform(0.0, 0.2))
        child.kill()
        child.join()
    assert not (tmp_path / "b" / "checkpoints" / "step-000320").exists(), (
        "the kills should hit an unfinished run"
    )
    child = start_child(tmp_path / "b", config)
    child.join()
    assert child.exitcode == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def wait_for_progress(path: Path, child: BaseProcess) -> None:
    """Until the child writes something, so that the kill hits a working run and not Python's start."""
    before = newest_change(path)
    while child.is_alive() and newest_change(path) == before:
        time.sleep(0.01)


def newest_change(path: Path) -> int:
    changes = []
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            changes.append(file.stat().st_mtime_ns)
    return max(changes, default=0)


@pytest.mark.slow
def test_an_interrupt_saves_the_iteration(tiny_folder, tmp_path):
    """No other checkpoint is due, so that what is there was saved for the interrupt."""
    child = start_child(tmp_path / "b", config_of(tiny_folder, 100_000, checkpoint_every=100_000))
    while not read_records(tmp_path / "b" / "metrics.jsonl"):
        time.sleep(0.05)
        assert child.is_alive()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 0
    checkpoint, _ = latest_checkpoint(tmp_path / "b" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == len(read_records(tmp_path / "b" / "programs.jsonl")) > 0
    run(tmp_path / "a", config_of(tiny_folder, checkpoint.step, checkpoint_every=100_000))
    assert_same_run(tmp_path / "a", tmp_path / "b")
