"""The public functions on hidden states and heads, or on logits: a few lines each on one vocabulary sweep.

The `*_from_logits` twins take logits that a trainer already has: one sweep, no log-softmax copy. With
inplace_backward=True their backward may overwrite the logits with their gradient, which saves memory. They
must then serve nothing else whose backward reads them; PyTorch raises a RuntimeError where they do. A leaf is
left as it is.
"""

import torch
from torch import Tensor

from etpo.kernels.backends import backend_of
from etpo.kernels.checks import build_logits_problem, build_problem, check_positive
from etpo.kernels.plan import AT, INDEX, NAMES, READS, P, Q, R, U
from etpo.kernels.streams import Lora, Problem, Stream, VocabStats

# How the functions below name the tensors of policy, critic and reference.
PREFIXES = ("", "q_", "ref_")
LOGPROB = ("lse_p", "e_pp", "at_p")
EXPECTATIONS = {"e_pr", "e_pu", "e_q"}


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
    inputs), [N] or [B, T], and differentiable in every floating tensor of the streams; an infinite
    expectation gives no gradient. Raises ValueError for input that does not fit.
    """
    problem, shape = build_problem(
        policy, critic, reference, targets=targets, mix=mix, ignore_index=ignore_index
    )
    fields = available_fields(problem)
    values = backend_of(backend, problem).sweep(problem, fields)
    named = {name: _shaped(value, problem, shape) for name, value in zip(fields, values, strict=True)}
    for name in EXPECTATIONS & named.keys():
        named[name] = torch.where(torch.isinf(named[name]), named[name].detach(), named[name])
    return VocabStats(**{name: named.get(name) for name in NAMES})


def available_fields(problem: Problem) -> tuple[str, ...]:
    """Names of the statistics that the streams of `problem` define."""
    planes = set(problem.streams)
    if problem.mixed and problem.mixed <= planes:
        planes.add(U)
    targets = problem.targets is not None
    return tuple(n for n in NAMES if READS[INDEX[n]] <= planes and (targets or INDEX[n] not in AT))


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
    built = build_problem(
        policy, None, None, targets=_given(targets), ignore_index=ignore_index, prefixes=PREFIXES
    )
    return _logprob(*built, backend)


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
    A token that the reference masks and the policy does not gives +inf, and that row no gradient. Raises
    ValueError for input that does not fit.
    """
    policy = Stream(hidden, weight, bias, temperature=temperature)
    reference = Stream(ref_hidden, ref_weight, ref_bias, temperature=temperature)
    problem, shape = build_problem(policy, None, reference, mix=(1.0, 0.0), prefixes=PREFIXES)
    return _shaped(backend_of(backend, problem).kl(problem), problem, shape)


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
    return _shaped(beta * backend_of(backend, problem).log_ratio(problem), problem, shape)


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
    return _shaped(backend_of(backend, problem).kl(problem), problem, shape)


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
        None, critic, None, targets=_given(targets), ignore_index=ignore_index, prefixes=("", "", "")
    )
    return _shaped(backend_of(backend, problem).gather(problem), problem, shape)


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log π(w), entropy of π) at each token, π = softmax(logits / temperature), in nats.

    logits [N, V] or [B, T, V], targets [N] or [B, T]: both results [N] or [B, T], float32 (float64 for
    float64 logits); rows with targets == ignore_index are 0. Raises ValueError for input that does not fit.
    """
    named = {P: ("logits", logits)}
    built = build_logits_problem(
        named, temperature=temperature, targets=_given(targets), ignore_index=ignore_index
    )
    return _logprob(*built, backend, inplace_backward)


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) of π = softmax(logits / temperature), π̄ = softmax(ref_logits / temperature), in nats.

    Both [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for input that does not fit.
    """
    named = {P: ("logits", logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(named, temperature=temperature, mix=(1.0, 0.0))
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(run.kl(problem, in_place=in_place), problem, shape)


def soft_value_from_logits(
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """V* = β·(lse(ref_logits + q_logits/β) − lse ref_logits), [N] or [B, T], in reward units.

    Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    named = {Q: ("q_logits", q_logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(named, mix=(1.0, 1.0 / beta))
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(beta * run.log_ratio(problem, in_place=in_place), problem, shape)


def soft_policy_kl_from_logits(
    logits: Tensor,
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄·exp(Q/β)/Z) of π = softmax(logits), π̄ = softmax(ref_logits), Q = q_logits, in nats.

    All [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for β ≤ 0 or input that does not
    fit.
    """
    beta = check_positive("beta", beta)
    named = {P: ("logits", logits), Q: ("q_logits", q_logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(named, mix=(1.0, 1.0 / beta))
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(run.kl(problem, in_place=in_place), problem, shape)


def _logprob(
    problem: Problem, shape: torch.Size, backend: str, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    lse_p, e_pp, at_p = run.sweep(problem, LOGPROB, in_place=in_place)
    return _shaped(at_p - lse_p, problem, shape), _shaped(-e_pp, problem, shape)


def _given(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("targets: expected an int64 or int32 tensor, got None")
    return targets


def _shaped(value: Tensor, problem: Problem, shape: torch.Size) -> Tensor:
    return value.to(problem.dtype).reshape(shape)


def _may_overwrite(problem: Problem, inplace_backward: bool) -> bool:
    """Whether a backward may overwrite the logits where the caller allows it.

    It may not where rows or streams share memory, where a leaf stands behind the logits, whose owner would
    find a gradient in its place, nor in a compiled graph, which plans memory itself.
    """
    if not inplace_backward or torch.compiler.is_compiling():
        return False
    logits = [source.hidden for source in problem.streams.values()]
    apart = len({z.untyped_storage().data_ptr() for z in logits}) == len(logits)
    apart = apart and all(z.stride(0) >= z.shape[1] and z.stride(1) == 1 for z in logits)
    roots = [z if z._base is None else z._base for z in logits]
    return apart and not any(root.is_leaf and root.requires_grad for root in roots)
