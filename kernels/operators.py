"""A problem as a custom operator takes it: tensors, whole numbers, floats."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from etpo.kernels.streams import Problem, Source

# The tensors of a source, in the order of the layout.
SLOTS = ("hidden", "weight", "bias", "lora A", "lora B")
NO_TENSOR = -1


class Flat(NamedTuple):
    """layout: for each stream and slot an index into `tensors`, then the ignore index.

    scales: for each stream temperature, softcap (0 for none) and lora scale, then the mix. A tensor that
    stands in two places is listed once, so that it is read once and gets one gradient.
    """

    tensors: list[Tensor]
    layout: list[int]
    scales: list[float]


def flatten(problem: Problem) -> Flat:
    """The distinct tensors and the numbers of `problem`, but for its targets.

    Raises RuntimeError for tensors with tangents, which an operator would drop without a word.
    """
    tensors: list[Tensor] = []
    layout: list[int] = []
    scales: list[float] = []
    for source in problem.sources:
        if source is None:
            layout += [NO_TENSOR] * len(SLOTS)
            scales += [1.0, 0.0, 1.0]
            continue
        a, b, scale = source.lora if source.lora is not None else (None, None, 1.0)
        for tensor in (source.hidden, source.weight, source.bias, a, b):
            layout.append(_index_of(tensor, tensors))
        scales += [source.temperature, source.softcap or 0.0, scale]
    refuse_tangents(tensors)
    return Flat(tensors, [*layout, problem.ignore_index], [*scales, *problem.mix])


def _index_of(tensor: Tensor | None, tensors: list[Tensor]) -> int:
    if tensor is None:
        return NO_TENSOR
    for k, known in enumerate(tensors):
        if known is tensor:
            return k
    tensors.append(tensor)
    return len(tensors) - 1


def unflatten(
    tensors: Sequence[Tensor], targets: Tensor | None, layout: Sequence[int], scales: Sequence[float]
) -> Problem:
    """The inverse of `flatten`."""
    sources: list[Source | None] = []
    for k in range(3):
        slots = layout[len(SLOTS) * k : len(SLOTS) * (k + 1)]
        hidden, weight, bias, a, b = (None if i == NO_TENSOR else tensors[i] for i in slots)
        temperature, softcap, scale = scales[3 * k : 3 * k + 3]
        if hidden is None:
            sources.append(None)
            continue
        lora = None if a is None or b is None else (a, b, scale)
        sources.append(Source(hidden, weight, bias, lora, temperature, softcap or None))
    policy, critic, reference = sources
    return Problem(policy, critic, reference, targets, (scales[-2], scales[-1]), layout[-1])


def hidden_slot(stream: int, layout: Sequence[int]) -> int:
    """The index of a stream's hidden states among the tensors."""
    return layout[len(SLOTS) * stream]


def head_tensors(source: Source) -> list[Tensor]:
    """The tensors of a source but for its hidden states."""
    parts = (source.weight, source.bias, *(source.lora or ())[:2])
    return [part for part in parts if isinstance(part, Tensor)]


def any_gradient(tensors: Sequence[Tensor]) -> bool:
    """True where a backward may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def no_autocast(tensor: Tensor) -> Any:
    """A context without autocast, which would take products to its own dtype."""
    return torch.autocast(tensor.device.type, enabled=False)


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError in forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("etpo.kernels: only backend='reference' has forward-mode derivatives")


def refuse_second_derivatives() -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError("etpo.kernels: only backend='reference' has second derivatives (create_graph)")


def wanted_of(ctx: Any) -> list[int]:
    """In the backward of an operator (tensors, *rest): which of the tensors ask for a gradient."""
    return [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]


def placed(ctx: Any, gradients: Mapping[int, Tensor]) -> tuple[Any, ...]:
    """What the backward of an operator (tensors, *rest) returns: the gradient of tensors[i] by i."""
    tensors, *rest = ctx.needs_input_grad
    return [gradients.get(i) for i in range(len(tensors))], *(None for _ in rest)


def fake_gradients(tensors: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """What an operator returns to a tracer for the gradients of tensors[i], i in `wanted`."""
    return [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in wanted]
