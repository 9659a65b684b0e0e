"""The functions of one number a token as a custom operator, for the problems that `rowwise` takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etpo.kernels import blocks, rowwise
from etpo.kernels.flat import (
    SLOTS,
    any_gradient,
    fake_gradient,
    flatten,
    head_tensors,
    no_autocast,
    unflatten,
)
from etpo.kernels.streams import Problem

# What the forward sweep leaves for backward: nothing, ∂/∂hidden of each stream, or ∂/∂(plane of logits).
NOTHING, BY_HIDDEN, BY_LOGITS = range(3)


@torch.library.custom_op("etpo::rowwise", mutates_args=())
def rowwise_op(
    tensors: Sequence[Tensor],
    slots: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    mode: int,
) -> tuple[Tensor, list[Tensor]]:
    """(numbers [N] float64, the derivatives of `mode` for the streams that ask for a gradient)."""
    problem = unflatten(tensors, None, slots, scales, 0)
    derivatives = _empty_derivatives(problem, kind, streams, mode)
    named = dict(zip(_names(problem, kind, streams, mode), derivatives, strict=True))
    with no_autocast(tensors[0]):
        by_hidden, by_logits = (named if mode == wanted else {} for wanted in (BY_HIDDEN, BY_LOGITS))
        return rowwise.forward(problem, kind, by_hidden, by_logits), derivatives


@rowwise_op.register_fake
def _(
    tensors: Sequence[Tensor],
    slots: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    mode: int,
) -> tuple[Tensor, list[Tensor]]:
    problem = unflatten(tensors, None, slots, scales, 0)
    hidden = problem.first.hidden
    numbers = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    return numbers, _empty_derivatives(problem, kind, streams, mode)


def _names(problem: Problem, kind: int, streams: Sequence[int], mode: int) -> list[int]:
    """The streams, or the planes, of the derivatives of `mode`, in the order in which they are passed on."""
    if mode == NOTHING:
        return []
    if mode == BY_HIDDEN:
        return list(streams)
    return sorted({part.plane for part in rowwise.parts_of(problem, kind) if part.stream in streams})


def _empty_derivatives(problem: Problem, kind: int, streams: Sequence[int], mode: int) -> list[Tensor]:
    hidden, n_vocab = problem.first.hidden, problem.first.n_vocab
    names = _names(problem, kind, streams, mode)
    if mode == BY_LOGITS:
        return [hidden.new_empty((hidden.shape[0], n_vocab), dtype=problem.dtype) for _ in names]
    widths = [source.hidden.shape[1] for k in names if (source := problem.sources[k]) is not None]
    return [hidden.new_empty((hidden.shape[0], width), dtype=problem.dtype) for width in widths]


@torch.library.custom_op("etpo::rowwise_backward", mutates_args=())
def rowwise_backward_op(
    g: Tensor,
    derivatives: Sequence[Tensor],
    tensors: Sequence[Tensor],
    slots: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The gradients of tensors[i] for i in `wanted`, from derivatives by the planes."""
    problem = unflatten(tensors, None, slots, scales, 0)
    named = dict(zip(_names(problem, kind, streams, BY_LOGITS), derivatives, strict=True))
    with no_autocast(g):
        return rowwise.backward(problem, kind, g, named, [tensors[i] for i in wanted])


@rowwise_backward_op.register_fake
def _(
    g: Tensor,
    derivatives: Sequence[Tensor],
    tensors: Sequence[Tensor],
    slots: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    return [fake_gradient(tensors[i]) for i in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    tensors, *ctx.static = inputs
    derivatives = output[1]
    ctx.n_tensors = len(tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*derivatives)
    by_logits = ctx.static[-1] == BY_LOGITS
    ctx.save_for_backward(*derivatives, *(tensors if by_logits else ()))
    ctx.dtypes = [tensor.dtype for tensor in tensors]


def _backward(ctx: Any, g: Tensor | None, _derivatives: Any) -> tuple[Any, ...]:
    slots, scales, kind, streams, mode = ctx.static
    grads: list[Tensor | None] = [None] * ctx.n_tensors
    none = [None] * 5
    if g is None:
        return grads, *none
    if mode == BY_HIDDEN:
        for stream, derivative in zip(streams, ctx.saved_tensors, strict=True):
            i = slots[stream * len(SLOTS)]
            # A token without a cotangent may hold an infinity.
            scaled = (derivative * g[:, None].to(derivative.dtype)).masked_fill_((g == 0)[:, None], 0.0)
            known = grads[i]
            grads[i] = scaled.to(ctx.dtypes[i]) if known is None else known + scaled.to(ctx.dtypes[i])
        return grads, *none
    n_saved = len(ctx.saved_tensors) - ctx.n_tensors
    derivatives, tensors = ctx.saved_tensors[:n_saved], ctx.saved_tensors[n_saved:]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    outs = rowwise_backward_op(g, derivatives, tensors, slots, scales, kind, streams, wanted)
    for i, out in zip(wanted, outs, strict=True):
        grads[i] = out
    return grads, *none


rowwise_op.register_autograd(_backward, setup_context=_setup)


def rowwise_numbers(problem: Problem, kind: int) -> Tensor | None:
    """KL(p ‖ softmax u), or lse_u − lse_r, [N] float64; None where a sweep in blocks is the better way."""
    tensors, slots, scales = flatten(problem)
    mode = _mode(problem, kind, tensors)
    if mode == NOTHING:
        return None
    return rowwise_op(tensors, slots, scales, kind, _gradient_streams(problem), mode)[0]


def _gradient_streams(problem: Problem) -> list[int]:
    present = [(k, source) for k, source in enumerate(problem.sources) if source is not None]
    return [k for k, source in present if any_gradient([source.hidden, *head_tensors(source)])]


def _mode(problem: Problem, kind: int, tensors: list[Tensor]) -> int:
    sources = [source for source in problem.sources if source is not None]
    if not any_gradient(tensors) or problem.first.weight is None:
        return NOTHING
    # Whole rows read whole heads, so a cast of the heads must be small enough to hold.
    cast = sum(t.numel() for t in tensors if t.dim() == 2 and t.shape[0] == problem.first.n_vocab)
    n_bytes = problem.dtype.itemsize
    if problem.first.hidden.dtype != problem.dtype and cast * n_bytes > blocks.KEEP_BYTES:
        return NOTHING
    if not any_gradient([tensor for source in sources for tensor in head_tensors(source)]):
        return BY_HIDDEN
    planes = _names(problem, kind, _gradient_streams(problem), BY_LOGITS)
    n_logits = problem.first.hidden.shape[0] * problem.first.n_vocab
    return BY_LOGITS if len(planes) * n_logits * n_bytes <= blocks.KEEP_BYTES else NOTHING
