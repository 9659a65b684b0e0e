"""Learners of one network reach the optimum of a GridWorld, where it is known by dynamic programming."""

import numpy as np
import pytest
import torch

from etpo.engine.config import Config
from etpo.engine.learners import learner_class
from etpo.engine.learners.etpo import EtpoLearner
from etpo.engine.policy_gradient import look_at
from etpo.envs.words.grid import grid_word_mdp
from etpo.envs.words.mdp import token_table
from etpo.envs.words.solve import entropy_regularised_return, soft_optimum
from tests.engine.tabular import TabularRoles, play

BETA, GAMMA = 0.1, 0.9


def config_of(algo: str, **overrides) -> Config:
    settings = {
        "algo": algo, "beta": BETA, "gamma": GAMMA, "optimizer": "adamw", "lr": 0.02, "clip_norm": 100.0,
        "max_kl_update": 1.0, "updates_per_batch": 2,
    }  # fmt: skip
    return Config(**(settings | overrides))


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "overrides"), [
    ("etpo", {}), ("etpo", {"lam": 0.8}), ("ppo-kl", {}),
])  # fmt: skip
def test_the_update_reaches_the_optimum(algo, overrides):
    mdp = grid_word_mdp(size=3)
    table = token_table(mdp)
    roles = TabularRoles(mdp)
    learner = learner_class(algo)(roles, config_of(algo, **overrides))
    best = entropy_regularised_return(table, soft_optimum(table, BETA, GAMMA).policy, BETA, GAMMA)
    start = entropy_regularised_return(table, roles.policy_XV(), BETA, GAMMA)
    assert start < 0.5 * best, "the task must have something to learn"
    draws = np.random.default_rng(0)
    for episode in range(300):
        learner.update(play(mdp, roles, "policy", 96, episode, draws))
    reached = entropy_regularised_return(table, roles.policy_XV(), BETA, GAMMA)
    print(algo, overrides, start, reached, best)
    assert best * (1 - 0.05) <= reached <= best + 1e-9


def test_targets_of_etpo_are_returns_at_lambda_one_and_one_step_at_lambda_zero():
    mdp = grid_word_mdp(size=3)

    def targets(lam: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        roles = TabularRoles(mdp)
        learner = EtpoLearner(roles, config_of("etpo", lam=lam))
        rng = np.random.default_rng(0)
        for episode in range(3):
            fresh = play(mdp, roles, "policy", 16, episode, rng)
            seen = look_at(roles, fresh, GAMMA)
            y, v, _ = learner.targets(seen)
        batch = seen.batch
        reward = batch.reward_K - BETA * (seen.logprob_mu - seen.logprob_ref)
        return y, v, reward, batch.discount_K

    y, v, reward, discount = targets(0.0)
    inner = discount == 1.0
    inner[-1] = False
    following = torch.cat((v[1:], v[:1]))
    torch.testing.assert_close(y[inner], (reward + following)[inner])
    y, _, reward, discount = targets(1.0)
    following = torch.cat((y[1:], y[:1]))
    torch.testing.assert_close(y[inner], (reward + following)[inner], rtol=1e-4, atol=1e-5)
