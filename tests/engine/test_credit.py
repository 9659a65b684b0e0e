"""Credit of single tokens: it points to the token that decides, keeps to bounds, and goes on after a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from etpo.engine.behaviour import behaviour
from etpo.engine.config import Config
from etpo.engine.credit import (
    SAMPLES,
    Blame,
    CreditKeeper,
    chosen_so_far,
    draw,
    lines_of_tokens,
    named_line,
    stretch_of,
)
from etpo.engine.learners import learner_class
from etpo.engine.loop import train
from etpo.engine.run_folder import RunFolder, read_records
from etpo.envs.words.mdp import WordMDP, Words
from tests.engine.tabular import TabularRoles, play

LETTERS, LENGTH = "abc", 3


def planted(position: int) -> WordMDP:
    """Words of three letters; one that has an `a` at `position` earns 1, any other −1."""
    words = Words(LETTERS, LENGTH, has_stop=False)
    earns = np.array([[1.0 if word[position] == 0 else -1.0 for word in words.words]])
    return WordMDP(
        words, reward_SA=earns, terminated_SA=np.ones_like(earns, dtype=bool),
        next_SAS=np.ones((1, len(words.words), 1)), start_S=np.ones(1),
        reference_XV=np.full((len(words.prefixes), len(LETTERS)), 1 / len(LETTERS)),
    )  # fmt: skip


@pytest.mark.parametrize(("algo", "position"), [("etpo", 0), ("etpo", 1), ("etpo", 2), ("etpo-q", 1)])
def test_credit_points_to_the_token_that_decides(algo, position, tmp_path):
    mdp = planted(position)
    roles = TabularRoles(mdp)
    rates = {"critic_lr": 0.1, "value_lr": 0.1} if algo == "etpo-q" else {}
    updates = 5 if algo == "etpo-q" else 1
    config = Config(
        algo=algo, beta=0.5, optimizer="adamw", lr=1e-4, clip_norm=100.0, updates_per_batch=updates,
        replay_capacity=64, minibatch=64, **rates,
    )  # fmt: skip
    learner = learner_class(algo)(roles, config)
    keeper = CreditKeeper(
        RunFolder(tmp_path), 0, lambda tokens: [LETTERS[token] for token in tokens.tolist()]
    )
    draws = np.random.default_rng(position)
    for episode in range(12):
        fresh = play(mdp, roles, "policy", 64, episode, draws)
        acted = behaviour(roles, "policy", fresh, config.gamma)
        log = learner.update(fresh)
    programs = [
        {"step": i + 1, "env": a.env, "episode": a.episode, "t": a.t, "reward": a.reward, "outcome": None,
         "error": None, "text": "".join(LETTERS[token] for token in a.tokens.tolist())}
        for i, a in enumerate(fresh)
    ]  # fmt: skip
    records = keeper.records(fresh, programs, acted, log.credit)
    assert len(records) >= 12
    for one in records:
        moved = np.subtract(one["q"], one["v"])
        decisive = np.argmax(moved) if one["reward"] > 0 else np.argmin(moved)
        assert decisive == position, (one["texts"], moved)
        assert sum(one["logprob"]) == pytest.approx(LENGTH * np.log(1 / 3), abs=0.3)
        assert one["logprob_ref"] == pytest.approx([np.log(1 / 3)] * LENGTH, abs=1e-4)


def test_stretches_grow_with_the_run_and_do_not_depend_on_its_end():
    firsts = [stretch_of(step) for step in range(1, 10_001)]
    lengths = np.unique(firsts, return_counts=True)[1]
    assert firsts[:17] == [1] * 16 + [17]
    assert min(lengths[:-1]) == 16
    assert len(lengths) < 65
    assert max(lengths) <= 1000


def test_what_is_kept_is_bounded_and_read_back(tmp_path):
    """10,000 programs whose rewards rise all the time: the worst case for the best."""
    draws = np.random.default_rng(0)
    mdp, roles = planted(0), TabularRoles(planted(0))
    keeper = CreditKeeper(RunFolder(tmp_path), 3, lambda tokens: ["x"] * len(tokens))
    fresh = play(mdp, roles, "policy", 1, 0, draws)
    acted = behaviour(roles, "policy", fresh, 1.0)
    records = []
    for step in range(1, 2001):
        program = {
            "step": step, "env": 0, "episode": step, "t": 0, "reward": draws.normal(), "outcome": None,
            "error": None, "text": "xxx",
        }  # fmt: skip
        records += keeper.records(fresh, [program], acted, None)
    assert len(records) < 800
    again = chosen_so_far(records)
    assert again == keeper._stretches
    for stretch in again.values():
        members = [s for s in range(stretch.first, 2001) if stretch_of(s) == stretch.first]
        lowest = sorted(members, key=lambda s: draw(3, s))[:SAMPLES]
        assert sorted(stretch.sample) == sorted(lowest)


def test_tokens_stand_on_the_lines_of_the_action():
    texts = ["<", "    ", "a", " = 1", "\n   ", " return", " a", "\n", ">"]
    assert lines_of_tokens(texts, "    a = 1\n    return a\n") == [None, 1, 1, 1, 1, 2, 2, 2, None]
    assert lines_of_tokens(texts, "elsewhere") == [None] * len(texts)
    assert named_line("line 12: NameError: name") == 12
    assert named_line("took too long") is None


def test_blame_counts_what_stands_on_the_named_line():
    blame = Blame()
    numbers = {"q": [0.0, 0.0, -1.0, 0.0, -9.0], "v": [0.0] * 5, "advantage": [-2.0, 0.0, 0.0, 0.0, -9.0]}
    blame.add(2, [1, 1, 2, 2, None], numbers)
    blame.add(1, [1, 1, 2, 2, None], numbers)
    blame.add(1, [None] * 5, numbers)
    assert (blame.n, blame.on_line, blame.on_line_update, blame.by_chance) == (2, 1, 1, 1.0)


@pytest.mark.parametrize("algo", ["etpo", "ppo-kl", "rloo", "grpo", "reflection", "etpo-q"])
def test_every_algorithm_leaves_what_it_has_and_a_resumed_run_the_same(algo, tiny_folder, tmp_path):
    def run(path: Path, steps: int, *, resume: bool = False) -> list[dict]:
        config = Config(
            algo=algo, env="etpo/GridWorld-v0", model=str(tiny_folder), steps=steps, envs=4, rollout_steps=2,
            max_new_tokens=4, updates_per_batch=1, replay_capacity=16, minibatch=8, threads=1,
        )  # fmt: skip
        folder = RunFolder(path) if resume else RunFolder.create(path, config)
        train(config, folder, resume=resume)
        return read_records(folder.credit_file)

    whole = run(tmp_path / "a", 24)
    run(tmp_path / "b", 12)
    assert run(tmp_path / "b", 24, resume=True) == whole
    one = whole[0]
    assert {"kind", "step", "reward", "why", "texts", "logprob", "kl"} <= one.keys()
    assert {name: name in one for name in ("v", "q", "advantage", "logprob_ref")} == {
        "v": algo in ("etpo", "etpo-q", "ppo-kl"), "q": algo in ("etpo", "etpo-q", "ppo-kl"),
        "advantage": algo != "reflection", "logprob_ref": algo != "reflection",
    }  # fmt: skip
    assert len(one["texts"]) == len(one["logprob"]) == len(one["kl"])
    if algo in ("ppo-kl", "rloo", "grpo"):
        assert len(set(one["advantage"])) == 1
    assert torch.isfinite(torch.tensor(one["logprob"])).all()
