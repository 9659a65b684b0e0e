"""Logits at one token a row in Triton: one pass over the rows of the head that occur, without atomics.

Imports triton, so it is itself imported at first use only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from etpo.kernels.chunked.gather import operands
from etpo.kernels.gradients import collect
from etpo.kernels.operators import Cotangents
from etpo.kernels.streams import Problem
from etpo.kernels.triton import sizes
from etpo.kernels.triton.tile import INTERPRET, Launch, dense, rounded, run

COLUMNS = sizes.GATHER_COLUMNS
OPTIONS = sizes.COMPILER | {"BLOCK": COLUMNS, "INTERPRET": INTERPRET, "num_warps": 4}


@triton.jit
def gather_kernel(
    hidden, weight, bias, targets, out, stride_h, stride_w, n_d, n_targets, ignore_index, BLOCK: tl.constexpr
):
    """out[k] = h·W_w + bias_w at w = targets[k], n_targets to a row of hidden; 0 where it is ignored."""
    place = tl.program_id(0).to(tl.int64)
    row = place // n_targets
    token = tl.load(targets + place)
    total = tl.zeros([BLOCK], tl.float32)
    value = 0.0
    if token != ignore_index:
        for d in range(0, n_d, BLOCK):
            columns = d + tl.arange(0, BLOCK)
            h = tl.load(hidden + row * stride_h + columns, mask=columns < n_d, other=0.0).to(tl.float32)
            w = tl.load(weight + token * stride_w + columns, mask=columns < n_d, other=0.0).to(tl.float32)
            total += h * w
        value = tl.sum(total, 0)
        if bias is not None:
            value += tl.load(bias + token).to(tl.float32)
    tl.store(out + place, value)


@triton.jit
def hidden_kernel(
    weight, targets, g, out, stride_w, n_d, n_targets, ignore_index,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out[row] = Σ g · W_w over the row's targets that count and have a cotangent."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_d
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n_targets):
        token = tl.load(targets + row * n_targets + k)
        value = tl.load(g + row * n_targets + k)
        live = (token != ignore_index) & (value != 0.0)
        w = tl.load(weight + token * stride_w + columns, mask=inside & live, other=0.0).to(tl.float32)
        total += tl.where(live, w * value, 0.0)
    tl.store(out + row * n_d + columns, rounded(total, out, INTERPRET), mask=inside)


@triton.jit
def head_kernel(
    hidden,
    g,
    order,
    tokens,
    ends,
    d_weight,
    d_bias,
    stride_h,
    n_d,
    n_targets,
    ignore_index,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """d_weight[w] = Σ g·h and d_bias[w] = Σ g over the rows of token w, in the order of the rows.

    order: places among the targets, sorted by token; tokens: their tokens; ends: where the places of that
    token end. The program of a token's first place takes them all.
    """
    start = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_d
    token = tl.load(tokens + start)
    before = tl.load(tokens + start - 1, mask=start > 0, other=ignore_index)
    stop = tl.where((token != ignore_index) & (token != before), tl.load(ends + start).to(tl.int32), start)
    total = tl.zeros([BLOCK], tl.float32)
    total_g = 0.0
    for k in range(start, stop):
        place = tl.load(order + k)
        value = tl.load(g + place)
        h = tl.load(hidden + (place // n_targets) * stride_h + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(value == 0.0, 0.0, h * value)
        total_g += value
    if stop > start:
        if d_weight is not None:
            tl.store(d_weight + token * n_d + columns, rounded(total, d_weight, INTERPRET), mask=inside)
        if d_bias is not None and tl.program_id(1) == 0:
            tl.store(d_bias + token, rounded(total_g, d_bias, INTERPRET))


def forward_launch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
                   out: Tensor) -> Launch:  # fmt: skip
    """Writes h·W_w + bias_w to out, [N·K] float32."""
    args = (hidden, weight, None if bias is None else bias.contiguous(), targets, out, hidden.stride(0),
            weight.stride(0), hidden.shape[1], out.shape[0] // hidden.shape[0], ignore_index)  # fmt: skip
    options = sizes.COMPILER | {"BLOCK": COLUMNS, "num_warps": 4}
    return Launch(gather_kernel, (out.shape[0],), args, options)


def hidden_launch(weight: Tensor, targets: Tensor, g: Tensor, out: Tensor, ignore_index: int) -> Launch:
    """Writes Σ g·W_w to out, [N, D]."""
    n_rows, n_d = out.shape
    args = (weight, targets, g, out, weight.stride(0), n_d, targets.shape[0] // n_rows, ignore_index)
    return Launch(hidden_kernel, (n_rows, triton.cdiv(n_d, COLUMNS)), args, OPTIONS)


def head_launch(hidden: Tensor, g: Tensor, targets: Tensor, d_weight: Tensor | None, d_bias: Tensor | None,
                ignore_index: int) -> Launch:  # fmt: skip
    """Writes the gradients of the rows of the head that occur among the targets."""
    tokens, order = torch.sort(targets, stable=True)
    ends = torch.searchsorted(tokens, tokens, right=True)
    n_rows, n_d = hidden.shape
    args = (hidden, g, order, tokens, ends, d_weight, d_bias, hidden.stride(0), n_d,
            targets.shape[0] // n_rows, ignore_index)  # fmt: skip
    return Launch(head_kernel, (targets.shape[0], triton.cdiv(n_d, COLUMNS)), args, OPTIONS)


def launches(hidden: Tensor, weight: Tensor, targets: Tensor, g: Tensor) -> list[tuple[str, Launch]]:
    """Every kernel once, by name."""
    return [
        ("forward", forward_launch(hidden, weight, None, targets, -100, g)),
        ("backward hidden", hidden_launch(weight, targets, g, hidden, -100)),
        ("backward head", head_launch(hidden, g, targets, weight, None, -100)),
    ]


def forward(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """h·W_w + bias_w at the targets, [N·K] float32."""
    hidden, weight, bias, targets = operands(problem)
    out = torch.empty(targets.shape[0], dtype=torch.float32, device=problem.device)
    if targets.shape[0]:
        launch = forward_launch(dense(hidden), dense(weight), bias, targets, problem.ignore_index, out)
        run([launch], problem.device)
    return [out]


def backward(problem: Problem, task: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for."""
    hidden, weight, bias, targets = operands(problem)
    g, ids = cotangents.g[0].contiguous(), {id(tensor) for tensor in cotangents.wanted}
    d_hidden, d_weight, d_bias = (
        torch.zeros(x.shape, dtype=x.dtype, device=g.device) if x is not None and id(x) in ids else None
        for x in (hidden, weight, bias)
    )
    todo = []
    if d_hidden is not None and targets.shape[0]:
        todo.append(hidden_launch(dense(weight), targets, g, d_hidden, problem.ignore_index))
    if (d_weight is not None or d_bias is not None) and targets.shape[0]:
        todo.append(head_launch(dense(hidden), g, targets, d_weight, d_bias, problem.ignore_index))
    run(todo, problem.device)
    parts = ((hidden, d_hidden), (weight, d_weight), (bias, d_bias))
    return collect(cotangents.wanted, [(id(x), total) for x, total in parts if total is not None])
