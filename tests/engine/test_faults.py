"""What goes wrong on the way: it ends in one line, and nothing that was whole is lost."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from gymnasium.spaces import Text
from safetensors.torch import load_file, save_file

import etpo
from etpo.engine.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from etpo.engine.config import Config
from etpo.engine.models.digest import STRIDE, digest_of_base
from etpo.engine.models.finite import Diverged
from etpo.engine.models.language_model import LanguageModel, gives_own_logits
from etpo.engine.models.places import ModelError
from etpo.engine.models.sampler import sample_actions
from etpo.engine.replay import Action, Replay
from tests.conftest import tiny_llama

QUICK = Config(
    env="etpo/GridWorld-v0", steps=4, envs=2, rollout_steps=1, max_new_tokens=6, updates_per_batch=1,
    minibatch=4, threads=1,
)  # fmt: skip


class Fails(gymnasium.Env):
    """Its fifth step gives no number."""

    observation_space = action_space = Text(20)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return "say", {}

    def step(self, action):
        self.t += 1
        return "say", None if self.t == 5 else 0.5, False, False, {}


def table(path: Path, n: int, names: str = "pq") -> str:
    path.write_text("a,b,y\n" + "".join(f"{i * 37 % 11},{i % 7},{names[i % 2]}\n" for i in range(n)))
    return str(path)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("what", [{"critic_lr": 1e20}, {"value_lr": 1e38}])
def test_a_run_that_diverges_ends_before_it_is_saved(what, tiny_folder, tmp_path):
    own = {"model": str(tiny_folder), "algo": "etpo-q", "steps": 16, "checkpoint_every": 2}
    config = replace(QUICK, **own, **what)
    with pytest.raises(
        Diverged, match=r"expected (a )?finite .*; earlier checkpoints are whole; start again"
    ) as e:
        etpo.train(config, out=tmp_path / "run")
    assert "\n" not in str(e.value)
    for name in saved(tmp_path / "run"):
        tensors = load_file(tmp_path / "run/checkpoints" / name / "state.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    records = [json.loads(line) for line in (tmp_path / "run/programs.jsonl").read_text().splitlines()]
    assert len(records) > int(saved(tmp_path / "run")[-1].removeprefix("step-"))


def test_logits_that_are_not_finite_are_not_drawn_from_and_not_opened():
    model = LanguageModel(tiny_llama())
    with torch.no_grad():
        model.hf.model.norm.weight[3] = float("inf")
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Diverged, match="expected finite logits to draw from"):
        sample_actions(model, [torch.tensor([2])], max_new_tokens=3, stop_token=1, generator=generator)
    with pytest.raises(ModelError, match="overflow in float32"):
        gives_own_logits(model)


def test_what_was_executed_before_an_environment_failed_is_kept(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    config = replace(
        QUICK, env="tests.engine.test_faults:Fails", model=str(tiny_folder), steps=24, rollout_steps=6
    )
    with pytest.raises(etpo.EtpoError, match="environment Fails: expected step to return a reward"):
        etpo.train(config, out=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/programs.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))


def test_a_run_goes_on_and_is_measured_on_its_own_table_only(tiny_folder, tmp_path):
    csv = table(tmp_path / "t.csv", 120)
    config = replace(QUICK, env=None, dataset=csv, target="y", model=str(tiny_folder), envs=1, steps=2)
    etpo.train(config, out=tmp_path / "run")
    table(tmp_path / "t.csv", 121)
    with pytest.raises(CheckpointError, match=r"expected the table that the run began with .* got another"):
        etpo.train(replace(config, steps=4), out=tmp_path / "run", resume=True)
    table(tmp_path / "t.csv", 120)
    assert etpo.train(replace(config, steps=4), out=tmp_path / "run", resume=True).step == 4


@pytest.mark.parametrize("roles", ["lora", "full"])
def test_a_run_goes_on_and_is_loaded_on_its_own_base_only(roles, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = replace(QUICK, model=str(base), roles=roles)
    etpo.train(config, out=tmp_path / "run")
    base = base if roles == "lora" else tmp_path / "run/reference"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for again in (
        lambda: etpo.load(tmp_path / "run"),
        lambda: etpo.train(replace(config, steps=8), tmp_path / "run", True),
    ):
        with pytest.raises(
            CheckpointError, match=r"expected the base that the run began with .* got another"
        ):
            again()


def test_the_digest_of_a_large_file_sees_what_training_moves(tmp_path, monkeypatch):
    monkeypatch.setattr("etpo.engine.models.digest.WHOLE_BELOW", 1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 * STRIDE))
    before = digest_of_base(str(tmp_path))
    for place in (0, STRIDE + 5, 2 * STRIDE + 999):
        raw = bytearray(3 * STRIDE)
        raw[place] = 1
        file.write_bytes(raw)
        assert digest_of_base(str(tmp_path)) != before
    file.write_bytes(bytes(3 * STRIDE + 1))
    assert digest_of_base(str(tmp_path)) != before
    assert digest_of_base(str(tmp_path / "none")) is None


def test_a_restored_action_s_hidden_states_lie_where_the_model_is():
    replay = Replay(4)
    one = torch.tensor([1])
    replay.add([Action(one, one, torch.zeros(1), 1.0, True, None, 0, 0, 0, hidden_ref=torch.randn(1, 8))])
    packed, entries = replay.state()
    again = Replay(4)
    again.restore(packed, entries, device="meta")
    action = again.actions[0]
    assert action.hidden_ref.device.type == "meta"
    assert action.tokens.device.type == "cpu"
    assert torch.cat([action.hidden_ref, torch.empty(2, 8, device="meta")]).shape == (3, 8)


@pytest.mark.parametrize("roles", ["lora", "full"])
def test_others_may_read_what_the_umask_lets_them(roles, tiny_folder, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    before = os.umask(0o022)
    try:
        etpo.train(replace(QUICK, model=str(tiny_folder), roles=roles), out=run)
        etpo.load(run).export(out)
    finally:
        os.umask(before)
    files = [path for folder in (run, out) for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_what_a_killed_process_left_behind_is_taken_away(tmp_path):
    (tmp_path / ".partial-123").mkdir()
    save_checkpoint(tmp_path, Checkpoint(1, {}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_critic_s_step_size_is_refused_where_there_is_no_such_critic(tiny_folder, tmp_path):
    config = replace(QUICK, model=str(tiny_folder), algo="etpo", critic_lr=1e-3)
    with pytest.raises(ValueError, match="--critic-lr: expected --algo etpo-q"):
        etpo.train(config, out=tmp_path / "run")
