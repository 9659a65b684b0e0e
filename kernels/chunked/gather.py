"""Logits at the target tokens alone: no sweep over the vocabulary. Targets [N·K] stand K to a row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from etpo.kernels.chunked import sizes
from etpo.kernels.gradients import collect
from etpo.kernels.operators import Cotangents, Rule, make_operator
from etpo.kernels.plan import Q
from etpo.kernels.streams import Problem


def gather(problem: Problem) -> Tensor:
    """The critic's products and bias at the targets, [N·K]."""
    return OPERATOR(problem, [1], 1)[0]


def empty(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The logits, without values."""
    hidden, *_, targets = operands(problem)
    return [hidden.new_empty(targets.shape[0], dtype=problem.dtype)]


def forward(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """h·W_w + bias_w [N·K] at w = targets, float32 or float64; 0 where targets == ignore_index."""
    hidden, weight, bias, targets = operands(problem)
    out = torch.zeros(targets.shape[0], dtype=problem.dtype, device=problem.device)
    real = (targets != problem.ignore_index).nonzero()[:, 0]
    for start in range(0, real.shape[0], _chunk(hidden)):
        places = real[start : start + _chunk(hidden)]
        tokens, rows = targets[places], places // targets_a_row(problem)
        values = (hidden[rows].to(out.dtype) * weight[tokens].to(out.dtype)).sum(1)
        out[places] = values if bias is None else values + bias[tokens].to(out.dtype)
    return [out]


def targets_a_row(problem: Problem) -> int:
    """K of targets [N·K]."""
    return 1 if problem.targets is None else max(1, problem.targets.shape[0] // max(1, problem.n_rows))


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weight, bias and targets of the critic."""
    critic, targets = problem.streams[Q], problem.targets
    assert critic.weight is not None
    assert targets is not None
    return critic.hidden, critic.weight, critic.bias, targets


def _chunk(hidden: Tensor) -> int:
    return max(1, sizes.GATHER_ELEMENTS // hidden.shape[1])


def backward(problem: Problem, task: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for."""
    hidden, weight, bias, targets = operands(problem)
    g, ids = cotangents.g[0], {id(tensor) for tensor in cotangents.wanted}
    live = ((targets != problem.ignore_index) & (g != 0)).nonzero()[:, 0]
    # Sums run over the tokens that occur, in the dtype of g, and are rounded once.
    seen, place = torch.unique(targets[live], return_inverse=True)
    d_hidden = torch.zeros(hidden.shape, dtype=g.dtype, device=g.device)
    n_seen = seen.shape[0] if id(weight) in ids else 0
    seen_weight = torch.zeros(n_seen, weight.shape[1], dtype=g.dtype, device=g.device)
    for start in range(0, live.shape[0], _chunk(hidden)):
        places = live[start : start + _chunk(hidden)]
        rows, column = places // targets_a_row(problem), g[places][:, None]
        if id(hidden) in ids:
            d_hidden.index_add_(0, rows, weight[targets[places]].to(g.dtype) * column)
        if id(weight) in ids:
            part = hidden[rows].to(g.dtype) * column
            seen_weight.index_add_(0, place[start : start + places.shape[0]], part)
    sums = [(id(hidden), d_hidden.to(hidden.dtype))]
    if id(weight) in ids:
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        sums.append((id(weight), d_weight.index_copy_(0, seen, seen_weight.to(weight.dtype))))
    if bias is not None and id(bias) in ids:
        totals = torch.zeros(seen.shape[0], dtype=g.dtype, device=g.device).index_add_(0, place, g[live])
        d_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
        sums.append((id(bias), d_bias.index_copy_(0, seen, totals.to(bias.dtype))))
    return collect(cotangents.wanted, sums)


OPERATOR = make_operator("gather", Rule(forward, empty, backward))
