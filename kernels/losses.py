"""The public functions on hidden states and heads, or on logits: a few lines each on one vocabulary sweep.

The `*_from_logits` twins take logits that a trainer already has: one sweep, no log-softmax copy. With
inplace_backward=True their backward may overwrite the logits with their gradient, which saves memory. They
must then serve nothing else whose backward reads them; PyTorch raises a RuntimeError where they do. A leaf is
left as it is.
"""

import torch
from torch import Tensor

from etpo.kernels.backends import backend_of
from etpo.kernels.checks import (
    ALL_ROWS,
    Rows,
    build_logits_problem,
    build_problem,
    check_positive,
)
from etpo.kernels.plan import AT, INDEX, NAMES, READS, P, Q, R, U
from etpo.kernels.streams import Lora, Problem, Stream, VocabStats
from etpo.kernels.tokens import at_tokens, one_target_a_row

# How the functions below name the tensors of policy, critic and reference.
PREFIXES = ("", "q_", "ref_")
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
    target ignore_index is 0 in every field and gives no gradient; of targets [N, K] or [B, T, K] the at_* are
    the logits at K tokens, and a row counts where one of them does. Results are float32 (float64 for float64
    inputs), [N] or [B, T], and differentiable in every floating tensor of the streams; an infinite
    expectation gives no gradient. Raises ValueError for input that does not fit.
    """
    problem, shape = build_problem(policy, critic, reference, rows=Rows(targets, ignore_index), mix=mix)
    problem, tokens = one_target_a_row(problem)
    run, fields = backend_of(backend, problem), available_fields(problem)
    if tokens is not None:
        fields = tuple(name for name in fields if INDEX[name] not in AT)
    values = run.statistics(problem, fields)
    named = {name: _shaped(value, problem, shape) for name, value in zip(fields, values, strict=True)}
    for name in EXPECTATIONS & named.keys():
        named[name] = torch.where(torch.isinf(named[name]), named[name].detach(), named[name])
    if targets is not None:
        for k, source in problem.streams.items():
            name = NAMES[AT[k]]
            at = named[name] if tokens is None else at_tokens(run, source, tokens, problem)
            named[name] = at.reshape(targets.shape)
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
    entropy_gradient: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log π(w), entropy of π) at each token, π = softmax(z): z_w − lse z and −E_π[z − lse z].

    hidden [N, D] or [B, T, D], weight [V, D], targets [N] or [B, T]: both results [N] or [B, T], in nats,
    float32 (float64 for float64 inputs). Rows with targets == ignore_index are 0. Of targets [N, K] or
    [B, T, K] the log-probabilities are those of K tokens, [N, K] or [B, T, K], and a row counts where one of
    them does. entropy_gradient: where it is False the entropy is without a gradient, and with one target a
    row that of the log-probability is made in the forward sweep where that pays: two matrix products with a
    frozen head in place of three. Raises ValueError for input that does not fit.
    """
    policy = Stream(hidden, weight, bias, lora, temperature, softcap)
    rows = Rows(_given(targets), ignore_index)
    problem, shape = build_problem(policy, None, None, rows=rows, prefixes=PREFIXES)
    return _logprob(problem, shape, targets.shape, backend, entropy_gradient=entropy_gradient)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    lora: Lora | None = None,
    ref_lora: Lora | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) = E_π[z − z̄] − lse z + lse z̄, exactly over the vocabulary, in nats.

    `temperature` and `softcap` are those of both heads. Shapes as in `vocab_stats`; the result is [N] or
    [B, T]. mask: bool, [N] or [B, T], True for the rows that count; the others are 0, give no gradient and
    cost nothing. weights: floating, [N] or [B, T], without gradient; the result is then the scalar
    Σ weight·KL, and its gradient is finished in the forward pass where that pays. A token that the reference
    masks and the policy does not gives +inf, and that row no gradient. Raises ValueError for input that does
    not fit.
    """
    policy = Stream(hidden, weight, bias, lora, temperature, softcap)
    reference = Stream(ref_hidden, ref_weight, ref_bias, ref_lora, temperature, softcap)
    rows = Rows(mask=mask, weights=weights)
    return divergence(policy, None, reference, (1.0, 0.0), rows=rows, backend=backend, prefixes=PREFIXES)


def divergence(
    policy: Stream,
    critic: Stream | None,
    reference: Stream | None,
    mix: tuple[float, float],
    *,
    rows: Rows = ALL_ROWS,
    backend: str = "auto",
    prefixes: tuple[str, str, str] = ("policy.", "critic.", "reference."),
) -> Tensor:
    """KL(softmax z_p ‖ softmax u) of streams of any kind, u = mix[0]·z_r + mix[1]·z_q; see `linear_kl`."""
    problem, shape = build_problem(policy, critic, reference, rows=rows, mix=mix, prefixes=prefixes)
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
    temperature: float = 1.0,
    q_lora: Lora | None = None,
    ref_lora: Lora | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """V* = β · log Σ_w π̄(w) · exp(Q(w)/β) = β·(lse(z̄ + Q/β) − lse z̄), with Q the critic's logits.

    The result is [N] or [B, T], in reward units, or with `weights` the scalar Σ weight·V*. `temperature` and
    `softcap` are those of both heads; mask and weights as in `linear_kl`. Raises ValueError for β ≤ 0 or
    input that does not fit.
    """
    beta = check_positive("beta", beta)
    critic = Stream(q_hidden, q_weight, q_bias, q_lora, temperature, softcap)
    reference = Stream(ref_hidden, ref_weight, ref_bias, ref_lora, temperature, softcap)
    rows = Rows(mask=mask, weights=weights)
    problem, shape = build_problem(
        None, critic, reference, rows=rows, mix=(1.0, 1.0 / beta), prefixes=PREFIXES
    )
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
    temperature: float = 1.0,
    lora: Lora | None = None,
    q_lora: Lora | None = None,
    ref_lora: Lora | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π_Q), π_Q = π̄·exp(Q/β)/Z, = E_π[z − u] − lse z + lse u with u = z̄ + Q/β, in nats.

    The result is [N] or [B, T], or with `weights` the scalar Σ weight·KL; it is differentiable in the critic
    and the reference too: detach what stays fixed. `temperature` and `softcap` are those of all heads; mask
    and weights as in `linear_kl`. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    policy = Stream(hidden, weight, bias, lora, temperature, softcap)
    critic = Stream(q_hidden, q_weight, q_bias, q_lora, temperature, softcap)
    reference = Stream(ref_hidden, ref_weight, ref_bias, ref_lora, temperature, softcap)
    rows, mix = Rows(mask=mask, weights=weights), (1.0, 1.0 / beta)
    return divergence(policy, critic, reference, mix, rows=rows, backend=backend, prefixes=PREFIXES)


def gather_q(
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
) -> Tensor:
    """Q(x, w), the logit at the target token alone (see `Stream`); no sweep over the vocabulary.

    hidden [N, D] or [B, T, D], targets [N] or [B, T], or [N, K] or [B, T, K] for K tokens each: the result
    has the shape of the targets, and is 0 where they == ignore_index. Raises ValueError for input that does
    not fit.
    """
    stream = Stream(hidden, weight, bias, lora, temperature, softcap)
    rows = Rows(_given(targets), ignore_index)
    problem, _ = build_problem(None, stream, None, rows=rows, prefixes=("", "", ""))
    run, tokens = backend_of(backend, problem), _given(problem.targets)
    return at_tokens(run, problem.streams[Q], tokens, problem).reshape(targets.shape)


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
    float64 logits); rows with targets == ignore_index are 0. Targets of K tokens a row as in
    `linear_logprob`. Raises ValueError for input that does not fit.
    """
    rows = Rows(_given(targets), ignore_index)
    problem, shape = build_logits_problem({P: ("logits", logits)}, temperature=temperature, rows=rows)
    return _logprob(problem, shape, targets.shape, backend, inplace_backward=inplace_backward)


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) of π = softmax(logits / temperature), π̄ = softmax(ref_logits / temperature), in nats.

    Both [N, V] or [B, T, V]; the result is [N] or [B, T]. mask and weights as in
    `linear_kl`. Raises ValueError for input that does not fit.
    """
    named = {P: ("logits", logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(
        named, rows=Rows(mask=mask, weights=weights), temperature=temperature, mix=(1.0, 0.0)
    )
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(run.kl(problem, in_place=in_place), problem, shape)


def soft_value_from_logits(
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """V* = β·(lse(ref_logits + q_logits/β) − lse ref_logits), [N] or [B, T], in reward units.

    mask and weights as in `linear_kl`. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    named = {Q: ("q_logits", q_logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(named, rows=Rows(mask=mask, weights=weights), mix=(1.0, 1.0 / beta))
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(beta * run.log_ratio(problem, in_place=in_place), problem, shape)


def soft_policy_kl_from_logits(
    logits: Tensor,
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄·exp(Q/β)/Z) of π = softmax(logits), π̄ = softmax(ref_logits), Q = q_logits, in nats.

    All [N, V] or [B, T, V]; the result is [N] or [B, T]. mask and weights as in
    `linear_kl`. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    named = {P: ("logits", logits), Q: ("q_logits", q_logits), R: ("ref_logits", ref_logits)}
    problem, shape = build_logits_problem(named, rows=Rows(mask=mask, weights=weights), mix=(1.0, 1.0 / beta))
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    return _shaped(run.kl(problem, in_place=in_place), problem, shape)


def _logprob(
    problem: Problem, shape: torch.Size, of_targets: torch.Size, backend: str, *,
    entropy_gradient: bool = True, inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run, in_place = backend_of(backend, problem), _may_overwrite(problem, inplace_backward)
    problem, tokens = one_target_a_row(problem)
    if tokens is None:
        logprob, entropy = run.logprob(problem, entropy_gradient=entropy_gradient, in_place=in_place)
    else:
        lse_p, e_pp = run.statistics(problem, ("lse_p", "e_pp"), in_place=in_place)
        entropy = -e_pp if entropy_gradient else -e_pp.detach()
        at_p = at_tokens(run, problem.streams[P], tokens, problem)
        lse_p = lse_p.repeat_interleave(max(1, tokens.shape[0] // max(1, problem.n_rows)))
        logprob = (at_p - lse_p).masked_fill(tokens == problem.ignore_index, 0.0)
    return logprob.to(problem.dtype).reshape(of_targets), _shaped(entropy, problem, shape)


def _given(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("targets: expected an int64 or int32 tensor, got None")
    return targets


def _shaped(value: Tensor, problem: Problem, shape: torch.Size) -> Tensor:
    """A number a row in the caller's shape; of a weighted sum a scalar."""
    return value.to(problem.dtype).reshape(() if problem.weights is not None else shape)


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
