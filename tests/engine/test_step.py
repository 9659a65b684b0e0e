"""A step of the policy is shortened until its KL fits, however far it went, and never dropped for it."""

import numpy as np
import pytest
import torch

from etpo.engine.config import Config
from etpo.engine.learners.rloo import RlooLearner
from etpo.engine.replay import collate
from etpo.engine.step import BoundedStep
from etpo.envs.words.grid import grid_word_mdp
from tests.engine.tabular import TabularRoles, play

BOUND = 0.02


def bounded() -> tuple[TabularRoles, BoundedStep]:
    mdp = grid_word_mdp(size=3)
    roles = TabularRoles(mdp)
    fresh = play(mdp, roles, "policy", 32, 0, np.random.default_rng(0))
    return roles, BoundedStep(roles, collate(fresh, 0.9))


@pytest.mark.parametrize("size", [0.01, 3.0, 300.0, 3e4])
def test_a_step_keeps_its_direction_and_as_much_of_its_length_as_fits(size) -> None:
    roles, step = bounded()
    table = roles.parameters("policy")["table"]
    before = table.detach().clone()
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        table.add_(direction, alpha=size)
    kl, share = step.shorten(BOUND)
    assert 0.0 < kl <= BOUND
    torch.testing.assert_close(table.detach() - before, share * size * direction, rtol=1e-3, atol=1e-5)
    assert share == 1.0 if size == 0.01 else kl > BOUND / 20


def test_a_step_is_not_dropped_where_its_kl_hardly_falls_at_first() -> None:
    """As of a router, whose choices change back only when the step is tiny."""
    roles, step = bounded()
    table = roles.parameters("policy")["table"]
    before = table.detach().clone()
    plain = roles.stream

    def routed(role, hidden):
        stream = plain(role, hidden)
        if role != "policy":
            return stream
        return stream._replace(weight=before + (1e4 * (stream.weight - before)).clamp(-3.0, 3.0))

    roles.stream = routed
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        table.add_(direction)
    kl, share = step.shorten(BOUND)
    assert 0.0 < kl <= BOUND
    torch.testing.assert_close(table.detach() - before, share * direction, rtol=1e-2, atol=1e-6)


def test_a_step_that_overshot_tenfold_forgets_its_momentum() -> None:
    mdp = grid_word_mdp(size=3)
    kept = {}
    for lr in (0.3, 1e3):
        roles = TabularRoles(mdp)
        learner = RlooLearner(roles, Config(algo="rloo", optimizer="sgd", lr=lr, max_kl_update=BOUND))
        fresh = play(mdp, roles, "policy", 32, 0, np.random.default_rng(0))
        for index, action in enumerate(fresh):
            action.reward = float(index % 3)
        log = learner.update(fresh)
        assert log.kl_update > 0.0
        kept[log.step_share] = any(name.startswith("optimizer") for name in learner.tensors())
    assert kept == {1.0: True, min(kept): False}
