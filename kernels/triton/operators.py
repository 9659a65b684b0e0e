"""The triton backend as custom operators: differentiable, and opaque to torch.compile.

Triton itself is imported when an operator first runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etpo.kernels.chunked import gather as gathered
from etpo.kernels.operators import (
    fake_gradients,
    flatten,
    no_autocast,
    placed,
    refuse_second_derivatives,
    unflatten,
    wanted_of,
)
from etpo.kernels.plan import EXPECTATIONS, LSE_P
from etpo.kernels.streams import KL_FIELDS, LOG_RATIO_FIELDS, Problem, VocabStats, kl_of, log_ratio_of


@torch.library.custom_op("etpo::triton_sweep", mutates_args=())
def sweep_op(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    in_place: bool,
) -> list[Tensor]:
    """The statistics `fields`, [N] float64 each. in_place: backward may overwrite given logits."""
    from etpo.kernels.triton import sweep as triton_sweep

    with no_autocast(tensors[0]):
        return triton_sweep.forward(unflatten(tensors, targets, layout, scales), list(fields))


@sweep_op.register_fake
def _(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    in_place: bool,
) -> list[Tensor]:
    hidden = unflatten(tensors, targets, layout, scales).first.hidden
    return [hidden.new_empty(hidden.shape[0], dtype=torch.float64) for _ in fields]


@torch.library.custom_op("etpo::triton_sweep_backward", mutates_args=())
def sweep_backward_op(
    g: Sequence[Tensor],
    active: Sequence[int],
    stats: Sequence[Tensor],
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The gradients of tensors[i] for i in `wanted`, from the cotangents g of the statistics `active`."""
    problem = unflatten(tensors, targets, layout, scales)
    return _gradients(problem, g, active, stats, fields, [tensors[i] for i in wanted], in_place=False)


@sweep_backward_op.register_fake
def _(
    g: Sequence[Tensor], active: Sequence[int], stats: Sequence[Tensor], tensors: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return fake_gradients(tensors, rest[-1])


def _gradients(
    problem: Problem,
    g: Sequence[Tensor],
    active: Sequence[int],
    stats: Sequence[Tensor],
    fields: Sequence[int],
    wanted: list[Tensor],
    *,
    in_place: bool,
) -> list[Tensor]:
    from etpo.kernels.triton import sweep as triton_sweep

    cotangents = {k: x.contiguous() for k, x in zip(active, g, strict=True)}
    with no_autocast(problem.first.hidden):
        return triton_sweep.backward(
            problem, cotangents, dict(zip(fields, stats, strict=True)), wanted, in_place=in_place
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, targets, *ctx.static = inputs
    ctx.n_tensors = len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(targets, *tensors, *output)


def _backward(ctx: Any, g: Sequence[Tensor | None] | None) -> tuple[Any, ...]:
    layout, scales, fields, in_place = ctx.static
    pairs = [(k, x) for k, x in zip(fields, g or [None] * len(fields), strict=True) if x is not None]
    if not pairs:
        return placed(ctx, {})
    refuse_second_derivatives()
    targets, *saved = ctx.saved_tensors
    tensors, stats = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
    active, cotangents = [k for k, _ in pairs], [x for _, x in pairs]
    wanted = wanted_of(ctx)
    if in_place:
        problem, logits = unflatten(tensors, targets, layout, scales), [tensors[i] for i in wanted]
        _gradients(problem, cotangents, active, stats, fields, logits, in_place=True)
        outs = [z.detach() for z in logits]
    else:
        outs = sweep_backward_op(cotangents, active, stats, tensors, targets, layout, scales, fields, wanted)
    return placed(ctx, dict(zip(wanted, outs, strict=True)))


sweep_op.register_autograd(_backward, setup_context=_setup)


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N] float64. in_place: backward overwrites given logits."""
    flat = flatten(problem)
    indices = [VocabStats._fields.index(name) for name in fields]
    # The derivative of an expectation needs the log-sum-exp of the policy.
    kept = [*indices, LSE_P] if EXPECTATIONS & set(indices) and LSE_P not in indices else indices
    stats = sweep_op(flat.tensors, problem.targets, flat.layout, flat.scales, kept, in_place)
    return dict(zip(fields, stats, strict=False))


def kl(problem: Problem, *, in_place: bool = False) -> Tensor:
    """KL(softmax z_p ‖ softmax u), [N] float64."""
    return kl_of(sweep(problem, KL_FIELDS, in_place=in_place))


def log_ratio(problem: Problem, *, in_place: bool = False) -> Tensor:
    """lse u − lse z_r, [N] float64."""
    return log_ratio_of(sweep(problem, LOG_RATIO_FIELDS, in_place=in_place))


def gather(problem: Problem) -> Tensor:
    """The critic's logits at the targets, [N]."""
    return gathered.gather(problem, triton=True)
