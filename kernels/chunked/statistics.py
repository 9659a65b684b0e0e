"""The arithmetic forward on one tile of logits, [n tokens, m vocabulary entries], and the merge of tiles.

Per-token numbers are rows of a float64 table [ROWS, n]: a few vectors beside a tile, and free of the rounding
that a float32 log-sum-exp near 1e4 would bring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked.rowwise import is_finite, softmax_into
from etpo.kernels.plan import (
    AT,
    E_PP,
    E_PR,
    E_PU,
    E_Q,
    EXPECTATIONS,
    LSE,
    LSE_P,
    LSE_Q,
    LSE_R,
    LSE_U,
    NAMES,
    P,
    Q,
    R,
    U,
)

# A row beside the statistics: 1 where some 0 · ∞ had to be taken as 0 by hand.
MASKED = len(NAMES)
ROWS = MASKED + 1
# The expectations, and the plane that each takes its contrast with.
CONTRASTS = ((E_PR, R), (E_PU, U), (E_PP, P), (E_Q, Q))
# Logits up to about this size lose nothing by their level.
COARSE = 64.0


# Logits of one tile by plane, [n, m] each.
Planes = dict[int, Tensor]


class Scratch(NamedTuple):
    """Reused memory of one tile's size."""

    prob: Tensor
    work: Tensor
    terms: Tensor


def mix_into(out: Tensor, planes: Planes, mix: tuple[float, float]) -> Tensor:
    """u = a·z_r + b·z_q, written to `out`; a coefficient of 0 drops its stream, infinities included.

    Where u is one of the two as it stands, that plane itself is returned.
    """
    (coefficient, k), *rest = [(c, k) for c, k in zip(mix, (R, Q), strict=True) if c != 0]
    if coefficient == 1.0 and not rest:
        return planes[k]
    torch.mul(planes[k], coefficient, out=out)
    for coefficient, k in rest:
        out.add_(planes[k], alpha=coefficient)
    return out


def tile_statistics(
    planes: Planes, fields: set[int], tokens: Tensor | None, whole: bool, scratch: Scratch
) -> Tensor:
    """Statistics of a tile's own columns, [ROWS, n] float64: expectations are under its own softmax.

    tokens: targets as columns of the tile, [n]; any integer where the target lies elsewhere. whole: True
    where the tile holds the whole vocabulary.
    """
    table = torch.zeros(ROWS, scratch.prob.shape[0], dtype=torch.float64, device=scratch.prob.device)
    for k in (Q, R, U):
        if LSE[k] in fields:
            same = [j for j in (Q, R) if k == U and LSE[j] in fields and planes[j] is planes[U]]
            table[LSE[k]] = table[LSE[same[0]]] if same else softmax_into(scratch.work, planes[k])
    if LSE_P in fields or not fields.isdisjoint(EXPECTATIONS):
        table[LSE_P] = softmax_into(scratch.prob, planes[P])
        _expectations(table, planes, fields, scratch, masked=False)
        if not is_finite(table[E_PR : E_Q + 1]):
            _expectations(table, planes, fields, scratch, masked=True)
            table[MASKED] = 1.0
    for k in (P, Q, R):
        if AT[k] in fields and tokens is not None:
            table[AT[k]] = at_tokens(planes[k], tokens, whole)
    return table


def _expectations(table: Tensor, planes: Planes, fields: set[int], scratch: Scratch, *, masked: bool) -> None:
    z_p, prob, work = planes[P], scratch.prob, scratch.work
    for field, k in CONTRASTS:
        if field not in fields:
            continue
        if field == E_PU and E_PR in fields and planes[U] is planes.get(R):
            table[E_PU] = table[E_PR]
            continue
        # The sum runs around a level known from log-sum-exps: a large common level would cost it digits.
        level = _level(table, fields, field).to(z_p.dtype).nan_to_num(0.0, 0.0, 0.0)
        if field in (E_PR, E_PU):
            torch.sub(z_p, planes[k], out=work).sub_(level[:, None])
        else:
            torch.sub(planes[k], level[:, None], out=work)
        if masked:
            work.masked_fill_(prob == 0, 0.0)
        table[field] = work.mul_(prob).sum(1).double() + level
        if field == E_PP:
            table[E_PP] -= table[LSE_P]


def _level(table: Tensor, fields: set[int], field: int) -> Tensor:
    if field == E_PP:
        return table[LSE_P]
    lse_other = {E_PR: LSE_R, E_PU: LSE_U, E_Q: LSE_Q}[field]
    if lse_other not in fields:
        return torch.zeros_like(table[LSE_P])
    if field == E_Q:
        # A log-sum-exp lies above the mean: as the level of a mean near 0 it would itself cost digits.
        return COARSE * torch.round(table[LSE_Q] / COARSE)
    return table[LSE_P] - table[lse_other]


def at_tokens(z: Tensor, tokens: Tensor, whole: bool) -> Tensor:
    """z at the column `tokens` of each row, [n]; 0 where the column lies outside the tile."""
    if whole:
        return z.gather(1, tokens[:, None])[:, 0]
    inside = (tokens >= 0) & (tokens < z.shape[1])
    values = z.gather(1, tokens.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, values, 0.0)


def merge(old: Tensor, new: Tensor) -> Tensor:
    """The statistics of two sets of columns together, from the tables [ROWS, n] of each."""
    out = old + new
    lse_rows = slice(LSE_P, LSE_U + 1)
    out[lse_rows] = torch.logaddexp(old[lse_rows], new[lse_rows])
    out[MASKED] = torch.maximum(old[MASKED], new[MASKED])
    lse_p = out[LSE_P]
    merged = torch.zeros_like(old[E_PR : E_Q + 1])
    for part in (old, new):
        share = (part[LSE_P] - lse_p).exp().masked_fill(torch.isneginf(part[LSE_P]), 0.0)
        means = part[E_PR : E_Q + 1].clone()
        means[E_PP - E_PR] += part[LSE_P] - lse_p
        merged += (share * means).masked_fill(share == 0, 0.0)
    # Columns that are masked throughout have no mean; beside others they count for nothing.
    out[E_PR : E_Q + 1] = merged.masked_fill_(torch.isneginf(lse_p), float("nan"))
    return out
