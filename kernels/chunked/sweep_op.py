"""The sweep in blocks as a custom operator: differentiable, and opaque to torch.compile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etpo.kernels.chunked import statistics as tiles
from etpo.kernels.chunked import sweep as blocks
from etpo.kernels.operators import (
    any_gradient,
    fake_gradients,
    flatten,
    no_autocast,
    placed,
    refuse_second_derivatives,
    unflatten,
    wanted_of,
)
from etpo.kernels.plan import U, forward_planes
from etpo.kernels.streams import Problem, VocabStats


@torch.library.custom_op("etpo::sweep", mutates_args=())
def sweep_op(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(statistics [ROWS, N] float64, the logits of each stream kept for backward if `keep`).

    in_place is for backward: it may overwrite given logits with their gradient.
    """
    problem = unflatten(tensors, targets, layout, scales)
    kept = _empty_kept(problem, fields) if keep else {}
    with no_autocast(tensors[0]):
        return blocks.forward(problem, set(fields), kept), list(kept.values())


def _kept_streams(problem: Problem, fields: Sequence[int]) -> list[int]:
    return sorted(forward_planes(set(fields), problem.mix) - {U})


def _empty_kept(problem: Problem, fields: Sequence[int]) -> dict[int, Tensor]:
    hidden = problem.first.hidden
    size = hidden.shape[0] * problem.first.n_vocab
    return {k: hidden.new_empty(size, dtype=problem.dtype) for k in _kept_streams(problem, fields)}


@sweep_op.register_fake
def _(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, list[Tensor]]:
    problem = unflatten(tensors, targets, layout, scales)
    hidden = problem.first.hidden
    table = hidden.new_empty((tiles.ROWS, hidden.shape[0]), dtype=torch.float64)
    return table, list(_empty_kept(problem, fields).values()) if keep else []


@torch.library.custom_op("etpo::sweep_backward", mutates_args=())
def sweep_backward_op(
    g: Tensor,
    table: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
    fields: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The gradients of tensors[i] for i in `wanted`, from the cotangent g of `table`."""
    problem = unflatten(tensors, targets, layout, scales)
    held = dict(zip(_kept_streams(problem, fields), kept, strict=True)) if kept else {}
    with no_autocast(g):
        return blocks.backward(problem, g, table, held, [tensors[i] for i in wanted], in_place=False)


@sweep_backward_op.register_fake
def _(
    g: Tensor, table: Tensor, kept: Sequence[Tensor], tensors: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return fake_gradients(tensors, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    tensors, targets, *ctx.static = inputs
    table, kept = output
    ctx.n_tensors = len(tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(targets, table, *tensors, *kept)


def _backward(ctx: Any, g: Tensor | None, _kept: Any) -> tuple[Any, ...]:
    if g is None:
        return placed(ctx, {})
    refuse_second_derivatives()
    layout, scales, fields, _, in_place = ctx.static
    targets, table, *saved = ctx.saved_tensors
    tensors, kept = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
    wanted = wanted_of(ctx)
    if in_place:
        problem, logits = unflatten(tensors, targets, layout, scales), [tensors[i] for i in wanted]
        blocks.backward(problem, g, table, {}, logits, in_place=True)
        outs = [z.detach() for z in logits]
    else:
        outs = sweep_backward_op(g, table, kept, tensors, targets, layout, scales, fields, wanted)
    return placed(ctx, dict(zip(wanted, outs, strict=True)))


sweep_op.register_autograd(_backward, setup_context=_setup)


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N] float64. in_place: backward overwrites given logits."""
    flat = flatten(problem)
    indices = [VocabStats._fields.index(name) for name in fields]
    keep = _keeps(problem, flat.tensors, indices)
    table, _ = sweep_op(flat.tensors, problem.targets, flat.layout, flat.scales, indices, keep, in_place)
    rows = table.unbind(0)
    return {name: rows[index] for name, index in zip(fields, indices, strict=True)}


def _keeps(problem: Problem, tensors: list[Tensor], fields: list[int]) -> bool:
    """True where the logits are few enough to be kept for backward; given logits are there anyway."""
    if problem.first.weight is None or not any_gradient(tensors):
        return False
    n_planes = len(_kept_streams(problem, fields)) + 1
    n_logits = n_planes * problem.first.hidden.shape[0] * problem.first.n_vocab
    return bool(n_logits * problem.dtype.itemsize <= blocks.KEEP_BYTES)
