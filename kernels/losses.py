"""The public functions on hidden states and heads: a few lines each on one vocabulary sweep."""

import torch
from torch import Tensor

from etpo.kernels.backends import Backend, backend_of
from etpo.kernels.streams import (
    Lora,
    Problem,
    Stream,
    VocabStats,
    available_fields,
    build_problem,
    check_positive,
)

# How the functions below name the tensors of policy, critic and reference.
PREFIXES = ("", "q_", "ref_")


def vocab_stats(
    policy: Stream | None,
    critic: Stream | None = None,
    reference: Stream | None = None,
    *,
    targets: Tensor | None = None,
    mix: tuple[float, float] = (1.0, 1.0),
    ignore_index: int = -100,
    backend: str = "auto",
) -> VocabStats:
    """Every statistic of `VocabStats` that the given streams define, in one sweep over the vocabulary.

    u = mix[0]·z_r + mix[1]·z_q; it exists where some coefficient is not 0 and the stream of each such
    coefficient is given. At least one stream must be given. targets: [N] or [B, T] integer tokens; a row with
    target ignore_index is 0 in every field and gives no gradient. Results are float32 (float64 for float64
    inputs), [N] or [B, T], and differentiable in every floating tensor of the streams. Raises ValueError for
    input that does not fit.
    """
    problem, shape = build_problem(
        policy, critic, reference, targets=targets, mix=mix, ignore_index=ignore_index
    )
    fields = _backend(backend, problem).sweep(problem, available_fields(problem))
    named = {name: _shaped(value, problem, shape) for name, value in fields.items()}
    return VocabStats(**{name: named.get(name) for name in VocabStats._fields})


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log π(w), entropy of π) at each token, π = softmax(z): z_w − lse z and −E_π[z − lse z].

    hidden [N, D] or [B, T, D], weight [V, D], targets [N] or [B, T]: both results [N] or [B, T], in nats,
    float32 (float64 for float64 inputs). Rows with targets == ignore_index are 0. Raises ValueError for input
    that does not fit.
    """
    policy = Stream(hidden, weight, bias, lora, temperature, softcap)
    problem, shape = build_problem(
        policy, None, None, targets=targets, ignore_index=ignore_index, prefixes=PREFIXES
    )
    stats = _backend(backend, problem).sweep(problem, ("lse_p", "e_pp", "at_p"))
    logprob = stats["at_p"] - stats["lse_p"]
    return _shaped(logprob, problem, shape), _shaped(-stats["e_pp"], problem, shape)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) = E_π[z − z̄] − lse z + lse z̄, exactly over the vocabulary, in nats.

    `temperature` divides the logits of both heads. Shapes as in `vocab_stats`; the result is [N] or [B, T].
    A token that the reference masks and the policy does not gives +inf. Raises ValueError for input that does
    not fit.
    """
    policy = Stream(hidden, weight, bias, temperature=temperature)
    reference = Stream(ref_hidden, ref_weight, ref_bias, temperature=temperature)
    problem, shape = build_problem(policy, None, reference, mix=(1.0, 0.0), prefixes=PREFIXES)
    return _shaped(_backend(backend, problem).kl(problem), problem, shape)


def soft_value(
    q_hidden: Tensor,
    q_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    beta: float,
    *,
    q_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """V* = β · log Σ_w π̄(w) · exp(Q(w)/β) = β·(lse(z̄ + Q/β) − lse z̄), with Q the critic's logits.

    The result is [N] or [B, T], in reward units. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    critic = Stream(q_hidden, q_weight, q_bias)
    reference = Stream(ref_hidden, ref_weight, ref_bias)
    problem, shape = build_problem(None, critic, reference, mix=(1.0, 1.0 / beta), prefixes=PREFIXES)
    return _shaped(beta * _backend(backend, problem).log_ratio(problem), problem, shape)


def soft_policy_kl(
    hidden: Tensor,
    weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    beta: float,
    *,
    bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π_Q), π_Q = π̄·exp(Q/β)/Z, = E_π[z − u] − lse z + lse u with u = z̄ + Q/β, in nats.

    The result is [N] or [B, T]; it is differentiable in the critic and the reference too: detach what stays
    fixed. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    policy = Stream(hidden, weight, bias)
    critic = Stream(q_hidden, q_weight, q_bias)
    reference = Stream(ref_hidden, ref_weight, ref_bias)
    problem, shape = build_problem(policy, critic, reference, mix=(1.0, 1.0 / beta), prefixes=PREFIXES)
    return _shaped(_backend(backend, problem).kl(problem), problem, shape)


def gather_q(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Q(x, w) = h·W_w + bias_w at the target token alone; no sweep over the vocabulary.

    hidden [N, D] or [B, T, D], targets [N] or [B, T]: the result is [N] or [B, T], 0 where targets ==
    ignore_index. Raises ValueError for input that does not fit.
    """
    critic = Stream(hidden, weight, bias)
    problem, shape = build_problem(
        None, critic, None, targets=targets, ignore_index=ignore_index, prefixes=("", "", "")
    )
    return _shaped(_backend(backend, problem).gather(problem), problem, shape)


def _backend(name: str, problem: Problem) -> Backend:
    return backend_of(name, problem.first.hidden.device, problem.dtype)


def _shaped(value: Tensor, problem: Problem, shape: torch.Size) -> Tensor:
    return value.to(problem.dtype).reshape(shape)
