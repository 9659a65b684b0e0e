"""The arithmetic forward on one tile of logits, [n tokens, m vocabulary entries], and the merge of tiles.

Per-token numbers are rows of a float64 table [ROWS, n]: a few vectors beside a tile, and free of the rounding
that a float32 log-sum-exp near 1e4 would bring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.plan import (
    AT_P,
    AT_Q,
    AT_R,
    E_PP,
    E_PR,
    E_PU,
    E_Q,
    EXPECTATIONS,
    LSE_P,
    LSE_Q,
    LSE_R,
    LSE_U,
)
from etpo.kernels.streams import VocabStats

# A row beside the statistics: 1 where some 0 · ∞ had to be taken as 0 by hand.
MASKED = len(VocabStats._fields)
ROWS = MASKED + 1
# Logits up to about this size lose nothing by their level.
COARSE = 64.0


class Planes(NamedTuple):
    """Logits of one tile, [n, m] each; None where nothing asks for them."""

    p: Tensor | None
    q: Tensor | None
    r: Tensor | None
    u: Tensor | None


class Scratch(NamedTuple):
    """Reused memory of one tile's size."""

    prob: Tensor
    work: Tensor
    terms: Tensor


def mix_into(out: Tensor, z_q: Tensor | None, z_r: Tensor | None, mix: tuple[float, float]) -> Tensor:
    """u = a·z_r + b·z_q, written to `out`; a coefficient of 0 drops its stream, infinities included."""
    terms = [(c, z) for c, z in zip(mix, (z_r, z_q), strict=True) if c != 0 and z is not None]
    (coefficient, z), *rest = terms
    torch.mul(z, coefficient, out=out)
    for coefficient, z in rest:
        out.add_(z, alpha=coefficient)
    return out


def softmax_into(out: Tensor, z: Tensor) -> Tensor:
    """Writes softmax(z) over the tile's columns to `out`; returns log-sum-exp in float64, [n].

    The largest probability is exp(0)/Σ, so the sum needs no pass of its own. A row of −inf alone gives −inf,
    and NaN for probabilities.
    """
    top = z.amax(1)
    torch.softmax(z, 1, out=out)
    lse = top.double() - out.amax(1).double().log()
    return lse.masked_fill_(torch.isneginf(top), float("-inf"))


def is_finite(values: Tensor) -> bool:
    """True where no value is infinite or NaN; one reduction."""
    return bool(torch.isfinite(values.sum()))


def tile_statistics(
    planes: Planes, fields: set[int], tokens: Tensor | None, whole: bool, scratch: Scratch
) -> Tensor:
    """Statistics of a tile's own columns, [ROWS, n] float64: expectations are under its own softmax.

    tokens: targets as columns of the tile, [n]; any integer where the target lies elsewhere. whole: True
    where the tile holds the whole vocabulary.
    """
    some = next(z for z in planes if z is not None)
    table = torch.zeros(ROWS, some.shape[0], dtype=torch.float64, device=some.device)
    for field, z in ((LSE_Q, planes.q), (LSE_R, planes.r), (LSE_U, planes.u)):
        if field in fields and z is not None:
            table[field] = softmax_into(scratch.work, z)
    if planes.p is not None and (LSE_P in fields or not fields.isdisjoint(EXPECTATIONS)):
        lse_p = softmax_into(scratch.prob, planes.p)
        table[LSE_P] = lse_p
        _expectations(table, planes, fields, scratch, masked=False)
        if not is_finite(table[E_PR : E_Q + 1]):
            _expectations(table, planes, fields, scratch, masked=True)
            table[MASKED] = 1.0
    if tokens is not None:
        for field, z in ((AT_P, planes.p), (AT_Q, planes.q), (AT_R, planes.r)):
            if field in fields and z is not None:
                table[field] = at_tokens(z, tokens, whole)
    return table


def _expectations(table: Tensor, planes: Planes, fields: set[int], scratch: Scratch, *, masked: bool) -> None:
    z_p, prob, work = planes.p, scratch.prob, scratch.work
    assert z_p is not None
    for field, other in ((E_PR, planes.r), (E_PU, planes.u), (E_PP, z_p), (E_Q, planes.q)):
        if field not in fields or other is None:
            continue
        # The sum runs around a level known from log-sum-exps: a large common level would cost it digits.
        level = _level(table, fields, field).to(z_p.dtype).nan_to_num(0.0, 0.0, 0.0)
        if field in (E_PR, E_PU):
            torch.sub(z_p, other, out=work).sub_(level[:, None])
        else:
            torch.sub(other, level[:, None], out=work)
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


def kl_rows(p: Tensor, u: Tensor, prob: Tensor, prob_u: Tensor, *, want_u: bool) -> Tensor:
    """KL(softmax p ‖ softmax u) of whole rows [n, V], [n] float64.

    Leaves ∂KL/∂p in `p` and, where want_u, ∂KL/∂u in `u`; prob and prob_u are scratch.
    """
    lse_p, lse_u = softmax_into(prob, p), softmax_into(prob_u, u)
    level = (lse_p - lse_u).to(p.dtype).nan_to_num(0.0, 0.0, 0.0)
    p.sub_(u).sub_(level[:, None])
    mean = torch.mul(p, prob, out=u).sum(1)
    if not is_finite(mean):
        p.masked_fill_(prob == 0, 0.0)
        mean = torch.mul(p, prob, out=u).sum(1)
    p.sub_(mean[:, None]).mul_(prob)
    if want_u:
        torch.sub(prob_u, prob, out=u)
    return mean.double() + (level.double() - lse_p + lse_u)


def log_ratio_rows(r: Tensor, u: Tensor, prob: Tensor) -> Tensor:
    """lse u − lse r of whole rows [n, V], [n] float64. Leaves its derivatives in `r` and `u`."""
    lse_r = softmax_into(prob, r)
    torch.neg(prob, out=r)
    lse_u = softmax_into(prob, u)
    u.copy_(prob)
    return lse_u - lse_r
