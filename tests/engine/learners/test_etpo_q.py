"""The update of the paper's two networks reaches the optimum of a GridWorld, in every Q form and backup."""

import numpy as np
import pytest
import torch

from etpo.engine.config import Config
from etpo.engine.learners.etpo_q import EtpoQLearner
from etpo.engine.replay import collate
from etpo.envs.words.grid import grid_word_mdp
from etpo.envs.words.mdp import token_table
from etpo.envs.words.solve import entropy_regularised_return, soft_optimum
from tests.engine.tabular import TabularRoles, play

BETA, GAMMA = 0.1, 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("q_form", "backup", "lam", "behaviour", "replay_weight", "n_updates"), [
    ("normalised", "soft", 0.95, "policy", "truncated", 120),
    ("normalised", "expected", 0.0, "policy", "truncated", 120),
    ("residual", "expected", 0.95, "policy", "truncated", 120),
    ("residual", "soft", 0.95, "reference", "truncated", 120),
    # Q = z_Q starts at log π̄, below every return: tokens not yet drawn look bad, so only draws from the
    # reference try them all; weighted by π_Q̄ they are learned more slowly
    ("logits", "soft", 0.95, "reference", "truncated", 240),
    ("logits", "soft", 0.95, "reference", "none", 120),
    ("logits", "expected", 0.0, "reference", "truncated", 120),
    ("logits", "expected", 0.0, "reference", "none", 120),
])  # fmt: skip
def test_the_update_reaches_the_optimum(q_form, backup, lam, behaviour, replay_weight, n_updates):
    mdp = grid_word_mdp(size=3)
    table = token_table(mdp)
    config = Config(
        algo="etpo-q", beta=BETA, gamma=GAMMA, lam=lam, q_form=q_form, backup=backup, optimizer="adamw",
        lr=0.05, critic_lr=0.05, value_lr=0.05, tau=0.8,
        clip_norm=100.0, max_kl_update=1.0, replay_capacity=512, minibatch=256, updates_per_batch=2,
        replay_weight=replay_weight,
    )  # fmt: skip
    roles = TabularRoles(mdp)
    learner = EtpoQLearner(roles, config)
    best = entropy_regularised_return(table, soft_optimum(table, BETA, GAMMA).policy, BETA, GAMMA)
    start = entropy_regularised_return(table, roles.policy_XV(), BETA, GAMMA)
    assert start < 0.5 * best, "the task must have something to learn"
    for episode in range(n_updates):
        learner.update(play(mdp, roles, behaviour, 64, episode, learner.rng))
    reached = entropy_regularised_return(table, roles.policy_XV(), BETA, GAMMA)
    print(q_form, backup, lam, replay_weight, start, reached, best)
    assert best * (1 - 0.02) <= reached <= best + 1e-9


class BiasedRoles(TabularRoles):
    """Logits of the policy have a bias that is learned, as the LM heads of GPT-J and Phi have."""

    def __init__(self, mdp):
        super().__init__(mdp)
        self.bias = torch.nn.Parameter(torch.zeros(mdp.reference_XV.shape[1]))

    def stream(self, role, hidden):
        stream = super().stream(role, hidden)
        return stream._replace(bias=self.bias) if role == "policy" else stream

    def parameters(self, role):
        return super().parameters(role) | ({"bias": self.bias} if role == "policy" else {})


def test_the_update_measures_how_far_a_heads_bias_moves_the_policy():
    mdp = grid_word_mdp(size=3)
    config = Config(
        algo="etpo-q", optimizer="adamw", lr=0.05, critic_lr=0.5, max_kl_update=10.0, updates_per_batch=4
    )
    roles = BiasedRoles(mdp)
    learner = EtpoQLearner(roles, config)
    fresh = play(mdp, roles, "policy", 32, 0, learner.rng)
    sequences = collate(fresh, GAMMA).sequences()
    hidden = roles.hidden("policy", sequences)

    def log_policy() -> torch.Tensor:
        return (hidden @ roles.tables["policy"].T + roles.bias).log_softmax(-1).detach()

    before = log_policy()
    log = learner.update(fresh)
    moved = (before.exp() * (before - log_policy())).sum(-1).mean().item()
    assert roles.bias.detach().abs().max() > 0.05
    assert log.kl_update == pytest.approx(moved, rel=1e-3)


def test_inside_an_action_q_is_the_value_of_the_next_token_state():
    """With v = u + β·Σ_{j<k} log(π_Q/π̄)(w_j) and u ≡ 0, Q(x_k, w_k) = V(x_{k+1}) for any logits."""
    mdp = grid_word_mdp(size=3)
    config = Config(
        algo="etpo-q", beta=BETA, gamma=GAMMA, lam=0.0, q_form="normalised", backup="soft", optimizer="adamw"
    )
    roles = TabularRoles(mdp)
    generator = torch.Generator().manual_seed(0)
    roles.tables["target"].data += torch.randn(roles.tables["target"].shape, generator=generator)
    batch = collate(play(mdp, roles, "policy", 32, 0, np.random.default_rng(0)), GAMMA)
    targets = EtpoQLearner(roles, config).targets(batch)
    inner = batch.discount_K == 1.0
    inner[torch.tensor([len(a.tokens) for a in batch.actions]).cumsum(0) - 1] = False
    assert inner.sum() >= 16
    assert targets.q[inner].abs().max() > 0.01, "the critic must differ from the reference"
    torch.testing.assert_close(targets.y[inner], targets.q[inner])


@pytest.mark.parametrize("backup", ["soft", "expected"])
def test_an_action_that_the_policy_would_no_longer_take_weighs_less(backup):
    """The ratio is of the policy whose value the backup takes: π_Q̄ for `soft`, π for `expected`."""
    mdp = grid_word_mdp(size=3)
    config = Config(algo="etpo-q", beta=BETA, gamma=GAMMA, backup=backup, optimizer="adamw")
    roles = TabularRoles(mdp)
    learner = EtpoQLearner(roles, config)
    batch = collate(play(mdp, roles, "policy", 32, 0, np.random.default_rng(0)), GAMMA)
    fresh = learner.targets(batch).weight
    assert fresh is not None
    torch.testing.assert_close(fresh, torch.ones_like(fresh), rtol=1e-4, atol=1e-5)
    moved, still = ("target", "policy") if backup == "soft" else ("policy", "target")
    generator = torch.Generator().manual_seed(0)
    for role in (moved, still):
        roles.tables[role].data += torch.randn(roles.tables[role].shape, generator=generator)
    log_pi = (roles.hidden(moved, batch.sequences()) @ roles.tables[moved].T).log_softmax(-1).detach()
    ratio = log_pi.gather(1, batch.tokens_K[:, None])[:, 0] - batch.logprob_mu_K
    want = [min(1.0, float(x.sum().exp())) for x in ratio.split([len(a.tokens) for a in batch.actions])]
    weight = learner.targets(batch).weight
    assert weight is not None
    ends = torch.tensor([len(a.tokens) for a in batch.actions]).cumsum(0) - 1
    assert weight[ends].tolist() == pytest.approx(want, rel=1e-3)
    assert 0 < min(want) < 0.5, "some action must have become unlikely"
    for options in ({"replay_weight": "none"}, {"q_form": "residual"}, {"q_form": "logits"}):
        without = Config(algo="etpo-q", **options)
        assert EtpoQLearner(roles, without).targets(batch).weight is None
    forced = EtpoQLearner(roles, Config(algo="etpo-q", q_form="residual", replay_weight="truncated"))
    assert forced.targets(batch).weight is not None
