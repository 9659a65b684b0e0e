"""The functions of one number a token as a custom operator, for the problems that `rowwise` takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etpo.kernels.chunked import rowwise
from etpo.kernels.chunked import sweep as blocks
from etpo.kernels.chunked.heads import needs_cast
from etpo.kernels.operators import (
    any_gradient,
    fake_gradients,
    flatten,
    head_tensors,
    hidden_slot,
    no_autocast,
    placed,
    refuse_second_derivatives,
    unflatten,
    wanted_of,
)
from etpo.kernels.streams import Problem

# What the forward sweep leaves for backward: ∂/∂hidden of each stream, or ∂/∂(plane of logits).
BY_HIDDEN, BY_LOGITS = range(2)


@torch.library.custom_op("etpo::rowwise", mutates_args=())
def rowwise_op(
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    mode: int,
) -> tuple[Tensor, list[Tensor]]:
    """(numbers [N] float64, the derivatives of `mode` for `streams`, those that ask for a gradient)."""
    problem = unflatten(tensors, None, layout, scales)
    derivatives = _empty_derivatives(problem, kind, streams, mode)
    named = dict(zip(_names(problem, kind, streams, mode), derivatives, strict=True))
    by_hidden, by_logits = (named if mode == wanted else {} for wanted in (BY_HIDDEN, BY_LOGITS))
    with no_autocast(tensors[0]):
        return rowwise.forward(problem, kind, by_hidden, by_logits), derivatives


@rowwise_op.register_fake
def _(
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    mode: int,
) -> tuple[Tensor, list[Tensor]]:
    problem = unflatten(tensors, None, layout, scales)
    hidden = problem.first.hidden
    numbers = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    return numbers, _empty_derivatives(problem, kind, streams, mode)


def _names(problem: Problem, kind: int, streams: Sequence[int], mode: int) -> list[int]:
    """The streams, or the planes, of the derivatives of `mode`, in the order in which they are passed on."""
    if mode == BY_HIDDEN:
        return list(streams)
    return sorted({part.plane for part in rowwise.parts_of(problem, kind) if part.stream in streams})


def _empty_derivatives(problem: Problem, kind: int, streams: Sequence[int], mode: int) -> list[Tensor]:
    hidden = problem.first.hidden
    names = _names(problem, kind, streams, mode)
    widths = [problem.first.n_vocab for _ in names]
    if mode == BY_HIDDEN:
        widths = [source.hidden.shape[1] for k in names if (source := problem.sources[k]) is not None]
    return [hidden.new_empty((hidden.shape[0], width), dtype=problem.dtype) for width in widths]


@torch.library.custom_op("etpo::rowwise_backward", mutates_args=())
def rowwise_backward_op(
    g: Tensor,
    derivatives: Sequence[Tensor],
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scales: Sequence[float],
    kind: int,
    streams: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The gradients of tensors[i] for i in `wanted`, from derivatives by the planes."""
    problem = unflatten(tensors, None, layout, scales)
    named = dict(zip(_names(problem, kind, streams, BY_LOGITS), derivatives, strict=True))
    with no_autocast(g):
        return rowwise.backward(problem, kind, g, named, [tensors[i] for i in wanted])


@rowwise_backward_op.register_fake
def _(g: Tensor, derivatives: Sequence[Tensor], tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return fake_gradients(tensors, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    tensors, *ctx.static = inputs
    mode, derivatives = ctx.static[-1], output[1]
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*derivatives)
    ctx.save_for_backward(*derivatives, *(tensors if mode == BY_LOGITS else ()))


def _backward(ctx: Any, g: Tensor | None, _derivatives: Any) -> tuple[Any, ...]:
    if g is None:
        return placed(ctx, {})
    refuse_second_derivatives()
    layout, scales, kind, streams, mode = ctx.static
    saved = ctx.saved_tensors
    if mode == BY_HIDDEN:
        grads: dict[int, Tensor] = {}
        for stream, derivative in zip(streams, saved, strict=True):
            i = hidden_slot(stream, layout)
            scaled = _scaled(derivative, g).to(ctx.dtypes[i])
            grads[i] = grads[i] + scaled if i in grads else scaled
        return placed(ctx, grads)
    n_saved = len(saved) - len(ctx.dtypes)
    derivatives, tensors = saved[:n_saved], saved[n_saved:]
    wanted = wanted_of(ctx)
    outs = rowwise_backward_op(g, derivatives, tensors, layout, scales, kind, streams, wanted)
    return placed(ctx, dict(zip(wanted, outs, strict=True)))


def _scaled(derivative: Tensor, g: Tensor) -> Tensor:
    """derivative · g row by row; in the memory of `derivative` where no second backward can ask for it."""
    rows = g[:, None].to(derivative.dtype)
    last = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
    scaled = derivative.mul_(rows) if last else derivative * rows
    # A token without a cotangent may hold an infinity.
    return scaled.masked_fill_((g == 0)[:, None], 0.0)


rowwise_op.register_autograd(_backward, setup_context=_setup)


def rowwise_numbers(problem: Problem, kind: int) -> Tensor | None:
    """KL(p ‖ softmax u), or lse u − lse r, [N] float64; None where the sweep in blocks is the better way."""
    flat = flatten(problem)
    if problem.first.weight is None or not any_gradient(flat.tensors):
        return None
    sources = [(k, source) for k, source in enumerate(problem.sources) if source is not None]
    # Whole rows read whole heads, so a cast of the heads must be small enough to hold.
    weights = [t for t in flat.tensors if t.dim() == 2 and t.shape[0] == problem.first.n_vocab]
    n_cast = sum(weight.numel() for weight in weights if needs_cast(weight, problem.dtype))
    if n_cast * problem.dtype.itemsize > blocks.KEEP_BYTES:
        return None
    streams = [k for k, source in sources if any_gradient([source.hidden, *head_tensors(source)])]
    mode = BY_HIDDEN
    if any_gradient([tensor for _, source in sources for tensor in head_tensors(source)]):
        mode = BY_LOGITS
        n_planes = len(_names(problem, kind, streams, mode)) + 1
        n_logits = n_planes * problem.first.hidden.shape[0] * problem.first.n_vocab
        if n_logits * problem.dtype.itemsize > blocks.KEEP_BYTES:
            return None
    return rowwise_op(flat.tensors, flat.layout, flat.scales, kind, streams, mode)[0]
