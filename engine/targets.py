"""Values of token states and the per-token soft Bellman targets.

Source: ETPO, arXiv:2402.06700; Retrace: Munos 2016, arXiv:1606.02647. Pure functions on tensors, no gradient.
All values are in reward units.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etpo.kernels import Stream, vocab_stats

QForm = Literal["logits", "residual", "normalised"]
Backup = Literal["expected", "soft"]


class PolicyStats(NamedTuple):
    """What a sweep says of the policy: log π(w|x) and KL(π(·|x) ‖ π_Q(·|x)), each [N]."""

    logprob: Tensor
    kl: Tensor


class TokenStats(NamedTuple):
    """What one sweep of the vocabulary says of N token states and the tokens w drawn there, each [N].

    Attributes:
        lse_q, lse_r, lse_u: log-sum-exp of z_Q, z_ref, and of the logits u of π_Q (see `mix_of`).
        at_q, at_r: z_Q(w) and z_ref(w).
        policy: None where no policy was swept.
    """

    lse_q: Tensor
    lse_r: Tensor
    lse_u: Tensor
    at_q: Tensor
    at_r: Tensor
    policy: PolicyStats | None


class TokenValues(NamedTuple):
    """What a Q function says of N token states and the tokens drawn there.

    Attributes:
        q: [N], Q(x, w) of the token drawn.
        v_soft: [N], V*(x) = β·log Σ_w π̄(w|x)·exp(Q(x, w)/β).
        logprob_soft: [N], log π_Q(w|x).
    """

    q: Tensor
    v_soft: Tensor
    logprob_soft: Tensor


def mix_of(q_form: QForm, beta: float) -> tuple[float, float]:
    """(a, b) of u = a·z_ref + b·z_Q, so that π_Q = softmax(u)."""
    return (1.0, 1.0 / beta) if q_form == "logits" else (0.0, 1.0)


def token_stats(
    policy: Stream | None, critic: Stream, reference: Stream, tokens: Tensor, mix: tuple[float, float]
) -> TokenStats:
    """One sweep of the vocabulary over the streams' N token states.

    Args:
        policy: None where the values do not need it.
        tokens: int64 [N], the token drawn at each state.
        mix: see `mix_of`.
    """
    s = vocab_stats(policy, critic, reference, targets=tokens, mix=mix)
    lse_u = there(s.lse_u)
    of_policy = None
    if policy is not None:
        lse_p = there(s.lse_p)
        of_policy = PolicyStats(there(s.at_p) - lse_p, there(s.e_pu) - lse_p + lse_u)
    return TokenStats(there(s.lse_q), there(s.lse_r), lse_u, there(s.at_q), there(s.at_r), of_policy)


def there(statistic: Tensor | None) -> Tensor:
    """A statistic whose streams were swept."""
    assert statistic is not None
    return statistic


def token_values(stats: TokenStats, v_head: Tensor | None, q_form: QForm, beta: float) -> TokenValues:
    """Q, V* and log π_Q from the statistics of one sweep.

    `logits`:      Q = z_Q(w),                                        V* = β·(lse u − lse z_ref)
    `residual`:    Q = v + β·(z_Q(w) − z_ref(w)),                     V* = v + β·(lse z_Q − lse z_ref)
    `normalised`:  Q = v + β·(log softmax(z_Q)(w) − log π̄(w)),        V* = v

    Args:
        stats: swept with `mix_of(q_form, beta)`.
        v_head: [N], the scalar head; not used by `logits`.
        q_form, beta: as configured; β > 0.

    Raises:
        ValueError: a form that needs the scalar head came without one.
    """
    if q_form == "logits":
        v_soft = beta * (stats.lse_u - stats.lse_r)
        return TokenValues(stats.at_q, v_soft, stats.at_r + stats.at_q / beta - stats.lse_u)
    if v_head is None:
        raise ValueError(f"q_form '{q_form}': expected the scalar head's values, got None")
    logprob_soft = stats.at_q - stats.lse_q
    if q_form == "normalised":
        return TokenValues(v_head + beta * (logprob_soft - (stats.at_r - stats.lse_r)), v_head, logprob_soft)
    v_soft = v_head + beta * (stats.lse_q - stats.lse_r)
    return TokenValues(v_head + beta * (stats.at_q - stats.at_r), v_soft, logprob_soft)


def expected_value(v_soft: Tensor, policy: PolicyStats, beta: float) -> Tensor:
    """V_π(x) = E_π[Q] − β·KL(π‖π̄) = V* − β·KL(π‖π_Q), [N]."""
    return v_soft - beta * policy.kl


def prefix_sums(x_K: Tensor, lengths: list[int]) -> Tensor:
    """Σ_{j<k} x_j inside each action, [K]; 0 at an action's first token."""
    return torch.cat([x.cumsum(0) - x for x in x_K.split(lengths)])


def retrace_targets(
    reward_K: Tensor,
    discount_K: Tensor,
    v_next_K: Tensor,
    q_K: Tensor,
    trace_K: Tensor,
    trace_goes_on_K: Tensor,
) -> Tensor:
    """y_k = ρ_k + d_k·[ V̄(x_{k+1}) + c_{k+1}·(y_{k+1} − Q̄(x_{k+1}, w_{k+1})) ]

    λ = 0 (c ≡ 0) is the one-step target y_k = ρ_k + d_k·V̄(x_{k+1}).

    Args:
        reward_K: [K], ρ; token states in the order of time inside every segment, segments one after another.
        discount_K: [K], d: 1 inside an action, γ at its last token, 0 at termination.
        v_next_K: [K], V̄ of the state after each token (any value where the discount is 0).
        q_K: [K], Q̄ of the token drawn at each state.
        trace_K: [K], c_k = λ·min(1, π_T(w_k)/μ(w_k)).
        trace_goes_on_K: bool [K], True where state k + 1 of the row is the state after token k.

    Returns:
        [K], detached, in the dtype of `q_K`.

    Raises:
        ValueError: shapes differ.
    """
    rows = (reward_K, discount_K, v_next_K, q_K, trace_K, trace_goes_on_K)
    if len({tuple(x.shape) for x in rows}) != 1 or q_K.dim() != 1:
        raise ValueError(
            f"retrace_targets: expected six rows of one length, got {[tuple(x.shape) for x in rows]}"
        )
    # y_k = a_k + b_k·y_{k+1}: a scalar recursion over at most some ten thousand tokens, exact in float64.
    goes_on = trace_goes_on_K.double()
    b_K = discount_K.double() * goes_on * _of_next(trace_K.double())
    a_K = reward_K.double() + discount_K.double() * v_next_K.double() - b_K * _of_next(q_K.double())
    a, b = a_K.tolist(), b_K.tolist()
    y_next = 0.0
    for k in range(len(a) - 1, -1, -1):
        # b is exactly 0 at the end of a segment; a NaN or inf there must not leak into the one before it
        y_next = a[k] + b[k] * y_next if b[k] else a[k]
        a[k] = y_next
    return torch.tensor(a, dtype=torch.float64, device=q_K.device).to(q_K.dtype)


def _of_next(x_K: Tensor) -> Tensor:
    """The value of the next state of the row at each one; 0 at the last."""
    return torch.cat((x_K[1:], x_K.new_zeros(1)))


def replay_weights(logprob_target_K: Tensor, logprob_mu_K: Tensor, lengths: list[int]) -> Tensor:
    """min(1, Π_k π_T(w_k|x_k)/μ(w_k|x_k)) of each action, at each of its tokens, [K].

    The truncated importance weight of a whole action (Espeholt 2018, arXiv:1802.01561; Le Roux 2025,
    arXiv:2503.14286, has it on the failed answers of a language model): the Bellman error counts where π_T
    goes. β·log(π_Q/π̄) of a program that failed has to reach its reward, some 15 nats below the reference;
    without the weight the critic goes on learning programs by heart that the policy has long ceased to write.
    """
    ratio = logprob_target_K - logprob_mu_K
    return torch.cat([x.sum().clamp_max(0.0).exp().expand(len(x)) for x in ratio.split(lengths)])


def trace_coefficients(logprob_target_K: Tensor, logprob_mu_K: Tensor, lam: float) -> Tensor:
    """c_k = λ·min(1, π_T(w_k|x_k)/μ(w_k|x_k)), [K]."""
    return lam * torch.exp((logprob_target_K - logprob_mu_K).clamp_max(0.0))
