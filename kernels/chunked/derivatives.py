"""The arithmetic backward on one tile of logits: from cotangents of statistics to derivatives by logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked.statistics import CONTRASTS, Planes, Scratch
from etpo.kernels.gradients import Plan, weighted_sum
from etpo.kernels.plan import E_PP, E_PR, E_PU, E_Q, EXPECTATIONS, LSE, LSE_P, LSE_U, P, Q, U


class TileCotangents(NamedTuple):
    """Of the rows of a tile: cotangents and statistics, [ROWS, n] float64 each.

    active: the statistics with some cotangent that is not 0; masked: True where some 0 · ∞ counts as 0.
    """

    g: Tensor
    stats: Tensor
    active: set[int]
    masked: bool


class Softmaxes(NamedTuple):
    """Softmax of p and of u, each a tile [n, m] times a scale [n] float64, None where the plan has none."""

    prob: Tensor
    scale: Tensor | None
    prob_u: Tensor
    scale_u: Tensor | None


def softmaxes(
    planes: Planes, cot: TileCotangents, plan: Plan, prob: Tensor, prob_u: Tensor, whole: bool
) -> Softmaxes:
    """The softmaxes that `plan` asks for, in the memory of prob and prob_u."""
    scale = scale_u = None
    if plan.prob:
        scale = probabilities_into(prob, planes[P], cot.stats[LSE_P], whole)
    if plan.prob_u:
        scale_u = probabilities_into(prob_u, planes[U], cot.stats[LSE_U], whole)
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


def policy_gradient(planes: Planes, cot: TileCotangents, softmax: Softmaxes, scratch: Scratch) -> Tensor:
    """∂/∂z_p of a tile but for the target's own term, in scratch.work:

    p·[g_lse_p + Σ g·(contrast − E + 1) over z_p − z_r and z_p − u + g_pp·(z_p − E z_p) + g_q·(z_q − e_q)].
    """
    prob, scale, work = softmax.prob, softmax.scale, scratch.work
    if scale is None or not cot.active & (EXPECTATIONS | {LSE_P}):
        return work.zero_()
    z_p, dtype = planes[P], prob.dtype
    constant = cot.g[LSE_P] * scale
    first = True
    for field, k in CONTRASTS:
        if field not in cot.active:
            continue
        g = cot.g[field] * scale
        out = work if first else scratch.terms
        mean = cot.stats[E_PP] + cot.stats[LSE_P] if field == E_PP else cot.stats[field]
        rounded = mean.to(dtype)
        if field in (E_PR, E_PU):
            torch.sub(z_p, planes[k], out=out).sub_(rounded[:, None])
            constant += g
        else:
            torch.sub(planes[k], rounded[:, None], out=out)
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
    k: int,
    share: float,
    planes: Planes,
    cot: TileCotangents,
    softmax: Softmaxes,
    scratch: Scratch,
    whole: bool,
) -> Tensor:
    """∂/∂z_k of a tile for the critic or the reference, but for the target's own term, in scratch.work:

    p·(g_q or −g_pr − share·g_pu) + share·softmax(u)·g_lse_u + softmax(z_k)·g_lse_k, where u has share · z_k.
    """
    g = cot.g
    terms: list[tuple[Tensor, Tensor]] = []
    under_p = (g[E_Q] if k == Q else -g[E_PR]) - share * g[E_PU]
    if softmax.scale is not None and bool(under_p.any()):
        terms.append((softmax.prob, under_p * softmax.scale))
    if softmax.scale_u is not None and share != 0:
        terms.append((softmax.prob_u, share * g[LSE_U] * softmax.scale_u))
    if LSE[k] in cot.active:
        own = probabilities_into(scratch.terms, planes[k], cot.stats[LSE[k]], whole)
        terms.append((scratch.terms, g[LSE[k]] * own))
    return weighted_sum(scratch.work, terms)


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
