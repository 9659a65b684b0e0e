"""The chunked sweep as custom operators: differentiable, and opaque to torch.compile."""

from collections.abc import Sequence
from typing import Any

import torch
from etpo.kernels import chunked, tiles
from etpo.kernels.streams import Problem, Source, VocabStats
from torch import Tensor

# Logits up to this size stay from forward to backward, as part of the workspace.
KEEP_BYTES = 1 << 26

SLOTS = ("hidden", "weight", "bias", "lora A", "lora B")
NO_TENSOR = -1


def flatten(problem: Problem) -> tuple[list[Tensor], list[int], list[float]]:
    """`problem` as an operator takes it: its distinct tensors, where each of SLOTS finds its own, its numbers.

    A tensor that stands in two places is passed once, so that it is read once and gets one gradient.
    """
    tensors: list[Tensor] = []
    slots: list[int] = []
    scales: list[float] = []
    for source in problem.sources:
        if source is None:
            slots += [NO_TENSOR] * len(SLOTS)
            scales += [1.0, 0.0, 1.0]
            continue
        a, b, scale = source.lora if source.lora is not None else (None, None, 1.0)
        for tensor in (source.hidden, source.weight, source.bias, a, b):
            slots.append(_index_of(tensor, tensors))
        scales += [source.temperature, source.softcap or 0.0, scale]
    return tensors, slots, [*scales, *problem.mix]


def _index_of(tensor: Tensor | None, tensors: list[Tensor]) -> int:
    if tensor is None:
        return NO_TENSOR
    for k, known in enumerate(tensors):
        if known is tensor:
            return k
    tensors.append(tensor)
    return len(tensors) - 1


def unflatten(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    slots: Sequence[int],
    scales: Sequence[float],
    ignore_index: int,
) -> Problem:
    """The inverse of `flatten`."""
    sources: list[Source | None] = []
    for k in range(3):
        parts = [None if i == NO_TENSOR else tensors[i] for i in slots[5 * k : 5 * k + 5]]
        hidden, weight, bias, a, b = parts
        temperature, softcap, scale = scales[3 * k : 3 * k + 3]
        if hidden is None:
            sources.append(None)
            continue
        lora = None if a is None or b is None else (a, b, scale)
        sources.append(Source(hidden, weight, bias, lora, temperature, softcap or None))
    return Problem(*sources, targets, (scales[9], scales[10]), ignore_index)


@torch.library.custom_op("etpo::sweep", mutates_args=())
def sweep_op(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    slots: Sequence[int],
    scales: Sequence[float],
    ignore_index: int,
    fields: Sequence[int],
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(statistics [ROWS, N] float64, logits kept for backward, flat, one for each stream that has a plane)."""
    problem = unflatten(tensors, targets, slots, scales, ignore_index)
    kept = _empty_kept(problem, fields) if keep else {}
    with _no_autocast(tensors[0]):
        return chunked.forward(problem, set(fields), kept), list(kept.values())


def _empty_kept(problem: Problem, fields: Sequence[int]) -> dict[int, Tensor]:
    streams = sorted(chunked.forward_planes(set(fields), problem.mix) - {chunked.U})
    hidden = problem.first.hidden
    size = hidden.shape[0] * problem.first.n_vocab
    return {k: torch.empty(size, dtype=problem.dtype, device=hidden.device) for k in streams}


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


@sweep_op.register_fake
def _(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    slots: Sequence[int],
    scales: Sequence[float],
    ignore_index: int,
    fields: Sequence[int],
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, list[Tensor]]:
    problem = unflatten(tensors, targets, slots, scales, ignore_index)
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
    slots: Sequence[int],
    scales: Sequence[float],
    ignore_index: int,
    fields: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The gradients of tensors[i] for i in `wanted`."""
    problem = unflatten(tensors, targets, slots, scales, ignore_index)
    streams = sorted(chunked.forward_planes(set(fields), problem.mix) - {chunked.U})
    held = dict(zip(streams, kept, strict=False))
    with _no_autocast(g):
        return chunked.backward(problem, g, table, held, [tensors[i] for i in wanted], in_place=False)


@sweep_backward_op.register_fake
def _(
    g: Tensor,
    table: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    slots: Sequence[int],
    scales: Sequence[float],
    ignore_index: int,
    fields: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    return [_fake_gradient(tensors[i]) for i in wanted]


def _fake_gradient(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    tensors, targets, *ctx.static = inputs
    table, kept = output
    ctx.n_tensors, ctx.has_targets = len(tensors), targets is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(table, *tensors, *([targets] if targets is not None else []), *kept)


def _backward(ctx: Any, g: Tensor | None, _kept: Any) -> tuple[Any, ...]:
    slots, scales, ignore_index, fields, _, in_place = ctx.static
    grads: list[Tensor | None] = [None] * ctx.n_tensors
    if g is None:
        return grads, *[None] * 7
    table, *saved = ctx.saved_tensors
    tensors, saved = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
    targets = saved.pop(0) if ctx.has_targets else None
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    if in_place:
        problem = unflatten(tensors, targets, slots, scales, ignore_index)
        outs = [tensors[i] for i in wanted]
        chunked.backward(problem, g, table, {}, outs, in_place=True)
    else:
        outs = sweep_backward_op(
            g, table, saved, tensors, targets, slots, scales, ignore_index, fields, wanted
        )
    for i, out in zip(wanted, outs, strict=True):
        grads[i] = out
    return grads, *[None] * 7


sweep_op.register_autograd(_backward, setup_context=_setup)


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N] float64. in_place: backward overwrites given logits."""
    tensors, slots, scales = flatten(problem)
    indices = [VocabStats._fields.index(name) for name in fields]
    keep = _keeps(problem, tensors, indices)
    table, _ = sweep_op(
        tensors, problem.targets, slots, scales, problem.ignore_index, indices, keep, in_place
    )
    rows = table.unbind(0)
    return {name: rows[index] for name, index in zip(fields, indices, strict=True)}


def _keeps(problem: Problem, tensors: list[Tensor], fields: list[int]) -> bool:
    """True where the logits are few enough to be kept for backward; given logits are there anyway."""
    if problem.first.weight is None or not torch.is_grad_enabled():
        return False
    if not any(tensor.requires_grad for tensor in tensors):
        return False
    n_planes = len(chunked.forward_planes(set(fields), problem.mix) - {chunked.U})
    n_logits = problem.first.hidden.shape[0] * problem.first.n_vocab
    return bool(n_planes * n_logits * problem.dtype.itemsize <= KEEP_BYTES)
