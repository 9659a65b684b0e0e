"""Logits at one token a row alone: no sweep over the vocabulary."""

from typing import Any

import torch
from torch import Tensor

from etpo.kernels.operators import (
    fake_gradients,
    head_tensors,
    no_autocast,
    refuse_second_derivatives,
    refuse_tangents,
)
from etpo.kernels.streams import Problem

# Elements of one chunk of gathered head rows.
CHUNK_ELEMENTS = 1 << 20


@torch.library.custom_op("etpo::gather", mutates_args=())
def gather_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, triton: bool
) -> Tensor:
    """h·W_w + bias_w [N] at w = targets, float32 or float64; 0 where targets == ignore_index."""
    if triton:
        from etpo.kernels.triton import gather as triton_gather

        return triton_gather.forward(hidden, weight, bias, targets, ignore_index)
    out = torch.zeros(hidden.shape[0], dtype=_dtype(hidden), device=hidden.device)
    real = (targets != ignore_index).nonzero()[:, 0]
    with no_autocast(hidden):
        for rows in real.split(_chunk(hidden)):
            tokens = targets[rows]
            values = (hidden[rows].to(out.dtype) * weight[tokens].to(out.dtype)).sum(1)
            out[rows] = values if bias is None else values + bias[tokens].to(out.dtype)
    return out


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunk(hidden: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // hidden.shape[1])


@gather_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, triton: bool
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_dtype(hidden))


@torch.library.custom_op("etpo::gather_backward", mutates_args=())
def gather_backward_op(
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, as far as `needs` asks."""
    if triton:
        from etpo.kernels.triton import gather as triton_gather

        return triton_gather.backward(g, hidden, weight, bias, targets, ignore_index, needs)
    rows_all = ((targets != ignore_index) & (g != 0)).nonzero()[:, 0]
    # Sums run over the tokens that occur, in the dtype of g, and are rounded once.
    seen, place = torch.unique(targets[rows_all], return_inverse=True)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    seen_weight = torch.zeros(
        seen.shape[0] if needs[1] else 0, weight.shape[1], dtype=g.dtype, device=g.device
    )
    for start in range(0, rows_all.shape[0], _chunk(hidden)):
        rows = rows_all[start : start + _chunk(hidden)]
        g_rows = g[rows][:, None]
        if needs[0]:
            d_hidden[rows] = (weight[targets[rows]].to(g.dtype) * g_rows).to(hidden.dtype)
        if needs[1]:
            part = hidden[rows].to(g.dtype) * g_rows
            seen_weight.index_add_(0, place[start : start + rows.shape[0]], part)
    grads = [d_hidden] if needs[0] else []
    if needs[1]:
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        grads.append(d_weight.index_copy_(0, seen, seen_weight.to(weight.dtype)))
    if needs[2] and bias is not None:
        sums = torch.zeros(seen.shape[0], dtype=g.dtype, device=g.device).index_add_(0, place, g[rows_all])
        grads.append(torch.zeros_like(bias).index_copy_(0, seen, sums.to(bias.dtype)))
    return grads


@gather_backward_op.register_fake
def _(
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    tensors = [
        tensor
        for tensor, need in zip((hidden, weight, bias), needs, strict=True)
        if need and tensor is not None
    ]
    return fake_gradients(tensors, range(len(tensors)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    refuse_second_derivatives()
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(gather_backward_op(g, *ctx.saved_tensors, ctx.ignore_index, needs, ctx.triton))
    return *(next(grads) if needed else None for needed in needs), None, None, None


gather_op.register_autograd(_backward, setup_context=_setup)


def gather(problem: Problem, *, triton: bool = False) -> Tensor:
    """The critic's logits at the targets, [N]; by plain PyTorch, or by the Triton kernels."""
    critic, targets = problem.critic, problem.targets
    assert critic is not None
    assert critic.weight is not None
    assert targets is not None
    refuse_tangents([critic.hidden, *head_tensors(critic)])
    return gather_op(critic.hidden, critic.weight, critic.bias, targets, problem.ignore_index, triton)
