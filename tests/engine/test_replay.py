"""Packing actions for the update, and the replay buffer."""

import numpy as np
import pytest
import torch

from etpo.engine.replay import Action, Replay, collate


def action(env=0, episode=0, t=0, n=3, terminated=False, reward=0.5) -> Action:
    return Action(
        prompt=torch.tensor([7, 8 + t]), tokens=torch.arange(n) + 10 * t, logprob_mu=-torch.ones(n),
        reward=reward, terminated=terminated, next_prompt=None if terminated else torch.tensor([7, 9 + t]),
        env=env, episode=episode, t=t,
    )  # fmt: skip


def test_an_episode_is_one_chain():
    batch = collate([action(t=1, n=2, terminated=True), action(t=0, n=3)], gamma=0.9)
    assert [a.t for a in batch.actions] == [0, 1]
    assert batch.discount_K.tolist() == pytest.approx([1, 1, 0.9, 1, 0])
    assert batch.reward_K.tolist() == [0, 0, 0.5, 0, 0.5]
    assert batch.next_K.tolist() == [1, 2, 3, 4, 0]
    assert batch.trace_goes_on_K.tolist() == [True, True, True, True, False]
    assert len(batch.suffixes) == 2


def test_a_missing_successor_is_bootstrapped():
    batch = collate([action(t=0, n=2), action(t=2, n=1, terminated=True)], gamma=0.9)
    assert batch.next_K.tolist() == [1, 3, 0]
    assert batch.trace_goes_on_K.tolist() == [True, False, False]
    assert batch.prompts[-1].tolist() == [7]
    assert batch.suffixes[-1].tolist() == [9]


def test_other_environments_and_episodes_are_no_successors():
    batch = collate([action(t=0), action(env=1, t=1), action(episode=1, t=1)], gamma=0.9)
    assert batch.trace_goes_on_K.tolist() == [True, True, False] * 3
    assert len(batch.suffixes) == 6


def test_suffixes_start_at_the_last_prompt_token():
    batch = collate([action(n=3, terminated=True)], gamma=1.0)
    assert batch.prompts[0].tolist() == [7]
    assert batch.suffixes[0].tolist() == [8, 0, 1]


def test_replay_forgets_the_oldest_and_draws_whole_episodes():
    replay = Replay(capacity=6)
    replay.add([action(env=e, t=t) for e in range(4) for t in range(2)])
    assert len(replay) == 6
    drawn = replay.sample(3, np.random.default_rng(0))
    assert len(drawn) == 4
    for a in drawn:
        assert any(b.env == a.env and b.t == 1 - a.t for b in drawn)
    assert len(replay.sample(100, np.random.default_rng(0))) == 6


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0.9)
