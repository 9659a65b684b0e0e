"""What must hold, numerically: five facts of entropy-regularised token-level RL, in float64, on small MDPs.

Values here are of size 1 to 10 and γ = 0.9, so value iteration (relative change 2e-15, words of 3 tokens)
is exact to about 2e-15 · 3 / (1 − γ) · 10 = 6e-13.
"""

from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from etpo.engine.losses import policy_loss
from etpo.engine.targets import (
    QForm,
    expected_value,
    mix_of,
    retrace_targets,
    token_stats,
    token_values,
    trace_coefficients,
)
from etpo.envs.words import solve as dp
from etpo.envs.words.mdp import Bools, Floats, Ints, TokenTable, WordMDP, token_table, word_probabilities
from etpo.envs.words.token_mdp import random_word_mdp
from etpo.kernels import Stream

GAMMA = 0.9
ATOL = 6e-13
SEEDS = range(6)
BETAS = (0.03, 0.3, 3.0)


def _mdp(seed: int) -> WordMDP:
    return random_word_mdp(seed, variable_length=seed % 2 == 0)


def _random_policy(table: TokenTable, seed: int) -> Floats:
    rng = np.random.default_rng([seed, 1])
    n_token_states, n_tokens = table.reference_XV.shape
    return rng.dirichlet(np.ones(n_tokens), n_token_states)


def _random_q(table: TokenTable, seed: int) -> Floats:
    return 3 * np.random.default_rng([seed, 2]).normal(size=table.reference_XV.shape)


def _sup(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_1_the_token_level_fixed_point_is_the_word_level_optimum(seed: int, beta: float) -> None:
    mdp = _mdp(seed)
    words, table = mdp.words, token_table(mdp)
    tokens, whole = dp.soft_optimum(table, beta, GAMMA), dp.word_soft_optimum(mdp, beta, GAMMA)
    v_SP = tokens.v.reshape(-1, len(words.prefixes))
    np.testing.assert_allclose(v_SP[:, 0], whole.v, rtol=0, atol=ATOL)
    q_SPV = tokens.q.reshape(*v_SP.shape, -1)
    for a, word in enumerate(words.words):
        last = q_SPV[:, words.prefix_ids[word[:-1]], word[-1]]
        np.testing.assert_allclose(last, whole.q[:, a], rtol=0, atol=ATOL)
    # An error in Q of ATOL is a relative error of ATOL/β in a probability, at most 1.
    said_SA = word_probabilities(words, tokens.policy)
    closed_SA = mdp.reference_SA * np.exp((whole.q - whole.v[:, None]) / beta)
    np.testing.assert_allclose(said_SA, closed_SA, rtol=0, atol=2 * ATOL / beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_2_the_expected_value_is_the_soft_value_less_a_kl(seed: int, beta: float) -> None:
    table = token_table(_mdp(seed))
    reference_XV, q_XV, policy_XV = table.reference_XV, _random_q(table, seed), _random_policy(table, seed)
    soft_X, best_XV = dp.soft_value(q_XV, reference_XV, beta), dp.soft_policy(q_XV, reference_XV, beta)
    expected_X = dp.expected_value(q_XV, policy_XV, reference_XV, beta)
    np.testing.assert_allclose(expected_X, soft_X - beta * dp.kl(policy_XV, best_XV), rtol=0, atol=ATOL)
    assert (expected_X < soft_X).all()
    np.testing.assert_allclose(
        dp.expected_value(q_XV, best_XV, reference_XV, beta), soft_X, rtol=0, atol=ATOL
    )


@pytest.mark.parametrize("step", [1.0, 0.3])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_3_policy_iteration_never_lowers_the_return(seed: int, beta: float, step: float) -> None:
    """With the whole policy update (step 1), and with a part of the way from log π to log π_Q."""
    table = token_table(_mdp(seed))
    policy_XV = _random_policy(table, seed)
    v_X, q_XV = dp.evaluate_policy(table, policy_XV, beta, GAMMA)
    for _ in range(12 if step == 1.0 else 100):
        log_best_XV = np.log(table.reference_XV) + q_XV / beta
        log_mixed_XV = (1 - step) * np.log(policy_XV) + step * log_best_XV
        policy_XV = dp.soft_policy(log_mixed_XV, np.ones_like(log_mixed_XV), 1.0)
        v_before_X = v_X
        v_X, q_XV = dp.evaluate_policy(table, policy_XV, beta, GAMMA)
        assert (v_X >= v_before_X - ATOL).all()
    np.testing.assert_allclose(v_X, dp.soft_optimum(table, beta, GAMMA).v, rtol=0, atol=ATOL)
    best = dp.entropy_regularised_return(table, policy_XV, beta, GAMMA)
    assert best == pytest.approx(table.start_X @ v_X, abs=ATOL)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_4_every_lambda_keeps_the_fixed_point(seed: int, lam: float) -> None:
    table, beta = token_table(_mdp(seed)), 0.3
    behaviour_XV = _random_policy(table, seed + 100)
    v_X, q_XV, best_XV = dp.soft_optimum(table, beta, GAMMA)
    y_XV = dp.retrace_sweep(table, q_XV, v_X, best_XV, behaviour_XV, GAMMA, lam)
    np.testing.assert_allclose(y_XV, q_XV, rtol=0, atol=ATOL)
    policy_XV = _random_policy(table, seed)
    v_X, q_XV = dp.evaluate_policy(table, policy_XV, beta, GAMMA)
    y_XV = dp.retrace_sweep(table, q_XV, v_X, policy_XV, behaviour_XV, GAMMA, lam)
    np.testing.assert_allclose(y_XV, q_XV, rtol=0, atol=ATOL)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_4_one_sweep_does_not_raise_the_error(seed: int, beta: float, lam: float) -> None:
    """A theorem for `expected` at every λ and for `soft` at λ = 0.

    For `soft` with λ > 0 it holds from a random Q̄ far from Q*, as here. Close to Q* it is no theorem, because
    π_Q̄ is not π*: of 300 random MDPs with Q̄ within about 0.3 of Q*, one saw its error grow by 5 %.
    """
    table = token_table(_mdp(seed))
    reference_XV, q_XV, policy_XV = table.reference_XV, _random_q(table, seed), _random_policy(table, seed)
    best_q_XV = dp.soft_optimum(table, beta, GAMMA).q
    policy_q_XV = dp.evaluate_policy(table, policy_XV, beta, GAMMA)[1]
    soft = dp.soft_value(q_XV, reference_XV, beta), dp.soft_policy(q_XV, reference_XV, beta)
    expected = dp.expected_value(q_XV, policy_XV, reference_XV, beta), policy_XV
    for behaviour_XV in (policy_XV, reference_XV, _random_policy(table, seed + 100)):
        y_XV = dp.retrace_sweep(table, q_XV, *soft, behaviour_XV, GAMMA, lam)
        assert _sup(y_XV, best_q_XV) <= _sup(q_XV, best_q_XV) + ATOL
        y_XV = dp.retrace_sweep(table, q_XV, *expected, behaviour_XV, GAMMA, lam)
        assert _sup(y_XV, policy_q_XV) <= _sup(q_XV, policy_q_XV) + ATOL


@pytest.mark.parametrize("seed", SEEDS)
def test_fact_4_the_soft_form_needs_the_soft_policy_in_its_trace(seed: int) -> None:
    """With π in place of π_Q̄ a sweep of `soft` takes the error up: the two belong together."""
    table, beta = token_table(_mdp(seed)), 0.3
    q_XV, policy_XV = _random_q(table, seed), _random_policy(table, seed)
    best_q_XV = dp.soft_optimum(table, beta, GAMMA).q
    soft_X = dp.soft_value(q_XV, table.reference_XV, beta)
    y_XV = dp.retrace_sweep(table, q_XV, soft_X, policy_XV, policy_XV, GAMMA, lam=1.0)
    assert _sup(y_XV, best_q_XV) > _sup(q_XV, best_q_XV)


@pytest.mark.parametrize("seed", SEEDS)
def test_fact_5_a_large_beta_gives_the_reference(seed: int) -> None:
    table, beta = token_table(_mdp(seed)), 1e6
    optimum = dp.soft_optimum(table, beta, GAMMA)
    # |log π*/π̄| is at most the spread of Q over β.
    np.testing.assert_allclose(optimum.policy, table.reference_XV, rtol=2 * np.ptp(optimum.q) / beta)
    v_X, _ = dp.evaluate_policy(table, table.reference_XV, beta, GAMMA)
    # V* exceeds V_π̄ by at most spread²/(8β) a token (Hoeffding), and rounds as β·log(1 + tiny) does.
    rounding = 10 * beta * np.finfo(float).eps * 3 / (1 - GAMMA)
    slack = np.ptp(optimum.q) ** 2 / (8 * beta) * 3 / (1 - GAMMA) + rounding
    assert (np.abs(optimum.v - v_X) <= slack).all()


def _greedy_optimum(table: TokenTable) -> Floats:
    """Q of the optimal control problem without any KL term, by value iteration."""
    v_X = np.zeros(len(table.start_X))
    for _ in range(1200):
        v_X = dp.backup(table, v_X, GAMMA).max(-1)
    return dp.backup(table, v_X, GAMMA)


@pytest.mark.parametrize("seed", SEEDS)
def test_fact_5_a_small_beta_gives_the_greedy_token(seed: int) -> None:
    mdp, beta = _mdp(seed), 1e-5
    table = token_table(mdp)
    optimum, greedy_q_XV = dp.soft_optimum(table, beta, GAMMA), _greedy_optimum(table)
    # A word's KL is at most log 1/π̄(a|s).
    slack = beta * np.log(1 / mdp.reference_SA.min()) / (1 - GAMMA)
    lost_X = greedy_q_XV.max(-1) - optimum.v
    assert (lost_X >= -ATOL).all()
    assert (lost_X <= slack).all()
    greedy_X = greedy_q_XV.argmax(-1)
    assert (optimum.policy[np.arange(len(greedy_X)), greedy_X] > 0.999).all()


# The same facts through the trainer's own functions: hidden states are one-hot token states [X, X], and a
# head [V, X] holds a table.


def _stream(logits_XV: Floats) -> Stream:
    return Stream(torch.eye(len(logits_XV), dtype=torch.float64), torch.from_numpy(logits_XV.T.copy()))


def _critic(q_XV: Floats, reference_XV: Floats, q_form: QForm, beta: float) -> tuple[Stream, Tensor | None]:
    """The critic's head and scalar head that say Q in a given form."""
    if q_form == "logits":
        return _stream(q_XV), None
    v_X = dp.soft_value(q_XV, reference_XV, beta)
    if q_form == "residual":
        v_X = v_X + 1.0  # any v will do: the head makes up for it
    return _stream(np.log(reference_XV) + (q_XV - v_X[:, None]) / beta), torch.from_numpy(v_X)


@pytest.mark.parametrize("q_form", get_args(QForm))
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_2_the_engine_reads_the_values_of_a_table(seed: int, beta: float, q_form: QForm) -> None:
    table = token_table(_mdp(seed))
    reference_XV, q_XV, policy_XV = table.reference_XV, _random_q(table, seed), _random_policy(table, seed)
    critic, v_head_X = _critic(q_XV, reference_XV, q_form, beta)
    for token in range(q_XV.shape[1]):
        stats = token_stats(
            _stream(np.log(policy_XV)),
            critic,
            _stream(np.log(reference_XV)),
            torch.full((len(q_XV),), token),
            mix_of(q_form, beta),
        )
        assert stats.policy is not None
        values = token_values(stats, v_head_X, q_form, beta)
        v_expected = expected_value(values.v_soft, stats.policy, beta)
        exact = {
            "q": (values.q, q_XV[:, token]),
            "v_soft": (values.v_soft, dp.soft_value(q_XV, reference_XV, beta)),
            "v_expected": (v_expected, dp.expected_value(q_XV, policy_XV, reference_XV, beta)),
            "logprob_soft": (
                values.logprob_soft, np.log(dp.soft_policy(q_XV, reference_XV, beta))[:, token],
            ),
        }  # fmt: skip
        for name, (got, value_X) in exact.items():
            # Log-probabilities are Q/β, so they carry the error of Q over β.
            atol = ATOL / min(beta, 1.0)
            np.testing.assert_allclose(got.numpy(), value_X, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("q_form", get_args(QForm))
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_3_a_gradient_step_of_the_policy_loss_raises_the_return(seed: int, q_form: QForm) -> None:
    table, beta = token_table(_mdp(seed)), 0.3
    reference_XV, policy_XV = table.reference_XV, _random_policy(table, seed)
    v_X, q_XV = dp.evaluate_policy(table, policy_XV, beta, GAMMA)
    policy, (critic, _) = _stream(np.log(policy_XV)), _critic(q_XV, reference_XV, q_form, beta)
    policy.weight.requires_grad_()
    loss = policy_loss(policy, critic, _stream(np.log(reference_XV)), q_form, beta)
    kl_X = dp.kl(policy_XV, dp.soft_policy(q_XV, reference_XV, beta))
    assert loss.item() == pytest.approx(kl_X.mean(), abs=ATOL / beta)
    loss.backward()
    assert policy.weight.grad is not None
    # The loss is a mean over X rows of a table: a step of 0.1·X is a step of 0.1 in each row's own KL.
    stepped_VX = (policy.weight - 0.1 * len(v_X) * policy.weight.grad).detach()
    stepped_XV = torch.softmax(stepped_VX.T, dim=-1).numpy()
    v_stepped_X, _ = dp.evaluate_policy(table, stepped_XV, beta, GAMMA)
    assert (v_stepped_X >= v_X - ATOL).all()
    assert table.start_X @ (v_stepped_X - v_X) > 1e-3


def _two_word_trajectories(mdp: WordMDP) -> tuple[Ints, Ints, Bools, Bools, Floats]:
    """Every trajectory of two words (of one, where that ends the episode), one after another.

    Returns, one row a token: token state, token, whether the next row follows it in the same trajectory,
    whether it is of the first word, and the probability of the environment's move to the next row.
    """
    words, rows = mdp.words, []
    n_prefixes = len(words.prefixes)
    for s, (a, word) in product(range(len(mdp.start_S)), enumerate(words.words)):
        first = [
            (s * n_prefixes + words.prefix_ids[word[:j]], w, True, True, 1.0) for j, w in enumerate(word)
        ]
        if mdp.terminated_SA[s, a]:
            rows += [*first[:-1], (*first[-1][:2], False, True, 1.0)]
            continue
        for s_next, second in product(range(len(mdp.start_S)), words.words):
            rows += [*first[:-1], (*first[-1][:4], mdp.next_SAS[s, a, s_next])]
            for j, w in enumerate(second):
                x = s_next * n_prefixes + words.prefix_ids[second[:j]]
                rows.append((x, w, j + 1 < len(second), False, 1.0))
    x_K, token_K, goes_on_K, is_first_K, moved_K = (np.array(column) for column in zip(*rows, strict=True))
    return x_K, token_K, goes_on_K, is_first_K, moved_K


@pytest.mark.parametrize("form", ["expected", "soft"])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_fact_4_the_engines_targets_average_to_the_exact_sweep(seed: int, lam: float, form: str) -> None:
    """Over all that μ may say in two words; the trajectory is cut off behind the second."""
    mdp, beta = random_word_mdp(seed, n_states=3, max_tokens=2, variable_length=seed % 2 == 0), 0.3
    table = token_table(mdp)
    q_XV, policy_XV = _random_q(table, seed), _random_policy(table, seed)
    behaviour_XV = _random_policy(table, seed + 100)
    v_X = dp.expected_value(q_XV, policy_XV, table.reference_XV, beta)
    if form == "soft":
        v_X, policy_XV = (f(q_XV, table.reference_XV, beta) for f in (dp.soft_value, dp.soft_policy))
    x_K, token_K, goes_on_K, is_first_K, moved_K = _two_word_trajectories(mdp)
    at_K = x_K, token_K
    v_next_K = np.where(goes_on_K, v_X[np.roll(x_K, -1)], (table.next_XVX @ v_X)[at_K])
    columns = (table.reward_XV[at_K], table.discount_XV(GAMMA)[at_K], v_next_K, q_XV[at_K])
    reward_K, discount_K, v_next_K_, q_K = (torch.from_numpy(column) for column in columns)
    logprob_K, logprob_mu_K = (torch.from_numpy(np.log(p_XV[at_K])) for p_XV in (policy_XV, behaviour_XV))
    trace_K = trace_coefficients(logprob_K, logprob_mu_K, lam)
    y_K = retrace_targets(reward_K, discount_K, v_next_K_, q_K, trace_K, torch.from_numpy(goes_on_K)).numpy()

    # The probability of all that follows a token in its trajectory.
    rest_K = np.ones(len(y_K))
    for k in range(len(y_K) - 2, -1, -1):
        if goes_on_K[k]:
            rest_K[k] = moved_K[k] * behaviour_XV[x_K[k + 1], token_K[k + 1]] * rest_K[k + 1]
    average_XV = np.zeros_like(q_XV)
    first = is_first_K.nonzero()[0]
    np.add.at(average_XV, (x_K[first], token_K[first]), (rest_K * y_K)[first])

    # A word behind which the trajectory is cut off pays at its end what would follow; first the second word.
    follow_X, trace_XV = v_X, lam * np.minimum(policy_XV, behaviour_XV)
    for _ in range(2):
        paid_XV = np.where(table.ends_XV, dp.backup(table, follow_X, GAMMA), 0.0)
        one_word = replace(table, reward_XV=paid_XV, terminated_XV=table.ends_XV)
        exact_XV = dp.retrace_sweep(one_word, q_XV, v_X, policy_XV, behaviour_XV, GAMMA, lam)
        follow_X = v_X + (trace_XV * (exact_XV - q_XV)).sum(-1)
    np.testing.assert_allclose(average_XV, exact_XV, rtol=0, atol=ATOL)
