"""The arithmetic backward on one tile of logits: from cotangents of statistics to derivatives by logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked.statistics import Planes, Scratch
from etpo.kernels.plan import E_PP, E_PR, E_PU, E_Q, EXPECTATIONS, LSE, LSE_P, LSE_U, Plan, Q


class Cotangents(NamedTuple):
    """Of the rows of a tile: cotangents and statistics, [ROWS, n] float64 each.

    active: the statistics with some cotangent that is not 0; masked: True where some 0 · ∞ counts as 0.
    """

    g: Tensor
    stats: Tensor
    active: set[int]
    masked: bool


class Softmaxes(NamedTuple):
    """Softmax of p and of u, each a tile [n, m] times a scale [n] float64; None where the plan has none."""

    prob: Tensor
    scale: Tensor | None
    prob_u: Tensor | None
    scale_u: Tensor | None


def softmaxes(
    planes: Planes, cot: Cotangents, plan: Plan, prob: Tensor, prob_u: Tensor | None, whole: bool
) -> Softmaxes:
    """The softmaxes that `plan` asks for, in the memory of prob and prob_u."""
    scale = scale_u = None
    if plan.prob and planes.p is not None:
        scale = probabilities_into(prob, planes.p, cot.stats[LSE_P], whole)
    if plan.prob_u and planes.u is not None and prob_u is not None:
        scale_u = probabilities_into(prob_u, planes.u, cot.stats[LSE_U], whole)
    return Softmaxes(prob, scale, prob_u, scale_u)


def probabilities_into(out: Tensor, z: Tensor, lse: Tensor, whole: bool) -> Tensor:
    """Writes to `out` what times the scale [n] float64 that is returned is exp(z − lse).

    whole: the tile holds the whole vocabulary, so that this is its softmax.
    """
    if whole:
        torch.softmax(z, 1, out=out)
        return torch.ones_like(lse)
    rounded = lse.to(z.dtype)
    torch.sub(z, rounded[:, None], out=out).exp_()
    return (rounded.double() - lse).exp()


def policy_gradient(planes: Planes, cot: Cotangents, softmax: Softmaxes, scratch: Scratch) -> Tensor:
    """∂/∂z_p of a tile but for the target's own term, in scratch.work:

    p·[g_lse_p + Σ g·(contrast − E + 1) over z_p − z_r and z_p − u + g_pp·(z_p − E z_p) + g_q·(z_q − e_q)].
    """
    z_p, prob, scale = planes.p, softmax.prob, softmax.scale
    work = scratch.work
    if z_p is None or scale is None or not cot.active & (EXPECTATIONS | {LSE_P}):
        return work.zero_()
    dtype = prob.dtype
    constant = cot.g[LSE_P] * scale
    first = True
    for field, other in ((E_PR, planes.r), (E_PU, planes.u), (E_PP, z_p), (E_Q, planes.q)):
        if field not in cot.active or other is None:
            continue
        g = cot.g[field] * scale
        out = work if first else scratch.terms
        mean = cot.stats[E_PP] + cot.stats[LSE_P] if field == E_PP else cot.stats[field]
        rounded = mean.to(dtype)
        if field in (E_PR, E_PU):
            torch.sub(z_p, other, out=out).sub_(rounded[:, None])
            constant += g
        else:
            torch.sub(other, rounded[:, None], out=out)
        constant -= (g * (mean - rounded.double())).masked_fill_(g == 0, 0.0)
        out.mul_(_column(g, dtype))
        if cot.masked:
            out.masked_fill_((g == 0)[:, None], 0.0)
        if not first:
            work.add_(out)
        first = False
    if first:
        return torch.mul(prob, _column(constant, dtype), out=work)
    if bool(constant.any()):
        work.add_(_column(constant, dtype))
    if cot.masked:
        work.masked_fill_(prob == 0, 0.0)
    return work.mul_(prob)


def other_gradient(
    k: int, share: float, z: Tensor | None, cot: Cotangents, softmax: Softmaxes, scratch: Scratch, whole: bool
) -> Tensor:
    """∂/∂z_k of a tile for the critic or the reference, but for the target's own term, in scratch.work:

    p·(g_q or −g_pr − share·g_pu) + share·softmax(u)·g_lse_u + softmax(z_k)·g_lse_k, where u has share · z_k.
    """
    g = cot.g
    terms: list[tuple[Tensor, Tensor]] = []
    under_p = (g[E_Q] if k == Q else -g[E_PR]) - share * g[E_PU]
    if softmax.scale is not None and bool(under_p.any()):
        terms.append((softmax.prob, under_p * softmax.scale))
    if softmax.prob_u is not None and softmax.scale_u is not None and share != 0:
        terms.append((softmax.prob_u, share * g[LSE_U] * softmax.scale_u))
    if LSE[k] in cot.active and z is not None:
        own = probabilities_into(scratch.terms, z, cot.stats[LSE[k]], whole)
        terms.append((scratch.terms, g[LSE[k]] * own))
    return weighted_sum(scratch.work, terms)


def weighted_sum(out: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """out = Σ tile · coefficient[:, None] over the (tile [n, m], coefficient [n]) of `terms`."""
    for k, (tile, coefficient) in enumerate(terms):
        column = _column(coefficient, out.dtype)
        if k == 0:
            torch.mul(tile, column, out=out)
        else:
            out.addcmul_(tile, column)
    return out if terms else out.zero_()


def add_at_tokens(dz: Tensor, g: Tensor, tokens: Tensor, whole: bool) -> None:
    """dz at each row's target column += g [n]; targets outside the tile are none of its business."""
    if whole:
        dz.scatter_add_(1, tokens[:, None], _column(g, dz.dtype))
        return
    inside = (tokens >= 0) & (tokens < dz.shape[1])
    values = _column(torch.where(inside, g, 0.0), dz.dtype)
    dz.scatter_add_(1, tokens.clamp(0, dz.shape[1] - 1)[:, None], values)


def _column(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None]
