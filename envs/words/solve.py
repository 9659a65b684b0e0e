"""Exact solutions of small word MDPs: soft optimum, policy evaluation and one sweep of Retrace, in float64.

Notation of the token level: Q(x, w), V(x), policy π(w|x), reference π̄(w|x), strength β of the KL term in
reward units, discount γ between words. Axes: X token states, V tokens, S states, A words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from etpo.envs.words.mdp import Floats, TokenTable, WordMDP

# Relative change at which value iteration stops: ten roundings of float64, so that it always gets there.
_TOLERANCE = 2e-15
_MAX_SWEEPS = 1_000_000


class SoftOptimum(NamedTuple):
    """V*, Q* and π*(w|x) = π̄·exp((Q* − V*)/β); a leading axis of X token states, or of S states."""

    v: Floats
    q: Floats
    policy: Floats


def _check(beta: float, gamma: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma: expected a number in [0, 1), got {gamma}")


def soft_value(q: Floats, reference: Floats, beta: float) -> Floats:
    """V* = β·log Σ_w π̄(w)·exp(Q(w)/β) over the last axis, for π̄ that sums to 1: [..., V] to [...]."""
    peak = q.max(-1, keepdims=True)
    # log1p and expm1, because at a large β the sum is so close to 1 that β·log(sum) would be mostly rounding.
    value: Floats = peak[..., 0] + beta * np.log1p((reference * np.expm1((q - peak) / beta)).sum(-1))
    return value


def soft_policy(q: Floats, reference: Floats, beta: float) -> Floats:
    """π_Q(w) = π̄(w)·exp((Q(w) − V*)/β), [..., V]."""
    weight: Floats = reference * np.exp((q - q.max(-1, keepdims=True)) / beta)
    weight /= weight.sum(-1, keepdims=True)
    return weight


def kl(policy: Floats, other: Floats) -> Floats:
    """KL(π ‖ other) over the last axis, in nats: [..., V] to [...]; 0·log 0 counts as 0."""
    ratio = np.where(policy > 0, policy, other) / other
    total: Floats = (policy * np.log(ratio)).sum(-1)
    return total


def expected_value(q: Floats, policy: Floats, reference: Floats, beta: float) -> Floats:
    """V_π = E_{w~π}[Q(w)] − β·KL(π ‖ π̄) over the last axis: [..., V] to [...]."""
    value: Floats = (policy * q).sum(-1) - beta * kl(policy, reference)
    return value


def backup(table: TokenTable, v_X: Floats, gamma: float) -> Floats:
    """Q(x, w) = ρ + d·E[V(x')], [X, V]."""
    return table.reward_XV + table.discount_XV(gamma) * (table.next_XVX @ v_X)


def _fixed_point(update: Callable[[Floats], Floats], v: Floats) -> Floats:
    """The v with update(v) = v, to float64 rounding."""
    for _ in range(_MAX_SWEEPS):
        v_new = update(v)
        if np.abs(v_new - v).max() <= _TOLERANCE * max(1.0, np.abs(v_new).max()):
            return v_new
        v = v_new
    raise RuntimeError(f"value iteration did not settle in {_MAX_SWEEPS} sweeps: choose a smaller gamma")


def soft_optimum(table: TokenTable, beta: float, gamma: float) -> SoftOptimum:
    """The token-level soft optimum by value iteration: Q = ρ + d·E[V*(x')], V* = β·log Σ π̄·exp(Q/β).

    Args:
        table: the process.
        beta: strength of the KL term, above 0.
        gamma: discount between words, in [0, 1).

    Returns:
        `v` [X], `q` [X, V], `policy` [X, V].

    Raises:
        ValueError: β or γ out of range.
    """
    _check(beta, gamma)
    reference_XV = table.reference_XV

    def update(v_X: Floats) -> Floats:
        return soft_value(backup(table, v_X, gamma), reference_XV, beta)

    v_X = _fixed_point(update, np.zeros(len(table.start_X)))
    q_XV = backup(table, v_X, gamma)
    return SoftOptimum(v_X, q_XV, soft_policy(q_XV, reference_XV, beta))


def word_soft_optimum(mdp: WordMDP, beta: float, gamma: float) -> SoftOptimum:
    """The action-level soft optimum by enumerating whole words.

    Q(s, a) = r + γ·(1 − terminated)·E[V(s')],  V(s) = β·log Σ_a π̄(a|s)·exp(Q(s, a)/β)

    Args:
        mdp: the process.
        beta: strength of the KL term, above 0.
        gamma: discount between words, in [0, 1).

    Returns:
        `v` [S], `q` [S, A], `policy` [S, A].

    Raises:
        ValueError: β or γ out of range.
    """
    _check(beta, gamma)
    reference_SA = mdp.reference_SA
    discount_SA = gamma * ~mdp.terminated_SA

    def word_backup(v_S: Floats) -> Floats:
        return mdp.reward_SA + discount_SA * (mdp.next_SAS @ v_S)

    def update(v_S: Floats) -> Floats:
        return soft_value(word_backup(v_S), reference_SA, beta)

    v_S = _fixed_point(update, np.zeros(len(mdp.start_S)))
    q_SA = word_backup(v_S)
    return SoftOptimum(v_S, q_SA, soft_policy(q_SA, reference_SA, beta))


def evaluate_policy(table: TokenTable, policy_XV: Floats, beta: float, gamma: float) -> tuple[Floats, Floats]:
    """V_π and Q_π exactly, by one linear solve of V = E_π[ρ + d·E[V(x')]] − β·KL(π ‖ π̄).

    Args:
        table: the process.
        policy_XV: π(w|x), rows that sum to 1; zeros are allowed.
        beta: strength of the KL term, above 0.
        gamma: discount between words, in [0, 1).

    Returns:
        (V_π [X], Q_π [X, V]).

    Raises:
        ValueError: β or γ out of range.
    """
    _check(beta, gamma)
    step_XX = np.einsum("xv,xvy->xy", policy_XV * table.discount_XV(gamma), table.next_XVX)
    gain_X = expected_value(table.reward_XV, policy_XV, table.reference_XV, beta)
    v_X = np.linalg.solve(np.eye(len(gain_X)) - step_XX, gain_X)
    return v_X, backup(table, v_X, gamma)


def entropy_regularised_return(table: TokenTable, policy_XV: Floats, beta: float, gamma: float) -> float:
    """E over first states of V_π: the objective that training raises."""
    return float(table.start_X @ evaluate_policy(table, policy_XV, beta, gamma)[0])


def retrace_sweep(
    table: TokenTable,
    q_XV: Floats,
    v_X: Floats,
    target_policy_XV: Floats,
    behaviour_XV: Floats,
    gamma: float,
    lam: float,
) -> Floats:
    """Expectation of the Retrace(λ) target over trajectories of any length drawn from μ, by a linear solve.

    y = ρ + d·E[ V̄(x') + Σ_{w'} μ(w'|x')·c(x', w')·(y(x', w') − Q̄(x', w')) ],  c = λ·min(1, π_T/μ)

    Args:
        table: the process.
        q_XV: Q̄, the target network.
        v_X: V̄, `expected_value` or `soft_value` of Q̄.
        target_policy_XV: π_T, the policy that V̄ belongs to: π, or `soft_policy` of Q̄.
        behaviour_XV: μ(w|x).
        gamma, lam: γ and λ.

    Returns:
        y, [X, V].
    """
    trace_XV = lam * np.minimum(behaviour_XV, target_policy_XV)
    follow_XVX = table.discount_XV(gamma)[..., None] * table.next_XVX
    size = q_XV.size
    follow = np.einsum("xvy,yw->xvyw", follow_XVX, trace_XV).reshape(size, size)
    error = backup(table, v_X, gamma) - q_XV
    return q_XV + np.linalg.solve(np.eye(size) - follow, error.ravel()).reshape(q_XV.shape)
