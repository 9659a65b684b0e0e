"""A problem as a custom operator takes it: tensors, whole numbers, floats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etpo.kernels.streams import Problem, Source

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
    policy, critic, reference = sources
    return Problem(policy, critic, reference, targets, (scales[9], scales[10]), ignore_index)


def no_autocast(tensor: Tensor) -> Any:
    """A context without autocast, which would take products to its own dtype."""
    return torch.autocast(tensor.device.type, enabled=False)


def fake_gradient(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def any_gradient(tensors: Sequence[Tensor]) -> bool:
    """True where a backward may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def head_tensors(source: Source) -> list[Tensor]:
    """The tensors of a source but for its hidden states."""
    parts = (source.weight, source.bias, *(source.lora or ())[:2])
    return [part for part in parts if isinstance(part, Tensor)]
