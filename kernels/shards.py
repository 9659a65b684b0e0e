"""Vocabularies in shards: each rank holds some rows of the heads, and statistics merge over the ranks.

A rank sweeps its own rows. What it sends is its statistics, at most a dozen float64 numbers a token, gathered
once in forward and merged in the order of the ranks; in backward the gradients of hidden states (and of a
low-rank A, which every rank holds) are summed over the ranks. Every rank computes the same loss.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etpo.kernels.plan import AT, E_PP, EXPECTATIONS, INDEX
from etpo.kernels.streams import VocabShard

LSE_NAMES = ("lse_p", "lse_q", "lse_r", "lse_u")


class SumGradient(torch.autograd.Function):
    """The tensor itself; in backward its gradient is summed over a group, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        total = g.to(torch.promote_types(g.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(g.dtype), None


def share_gradient(tensor: Tensor, shard: VocabShard) -> Tensor:
    """A tensor that every rank of `shard` holds, with its gradient summed over them."""
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return tensor
    shared: Tensor = SumGradient.apply(tensor, shard.group)  # type: ignore[no-untyped-call]
    return shared


@lru_cache(maxsize=64)
def vocabulary_of(shard: VocabShard, n_local: int, device: torch.device) -> int:
    """V of the whole vocabulary. Raises ValueError, on every rank, where the shards do not lie end to end."""
    mine = torch.tensor([shard.start, n_local], device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, mine, group=shard.group)
    stop = 0
    for rank, (start, n_rows) in enumerate(part.tolist() for part in parts):
        if start != stop:
            raise ValueError(f"shard: expected start {stop} on rank {rank}, got {start}")
        stop = start + n_rows
    return stop


def local_tokens(tokens: Tensor, shard: VocabShard, n_local: int, ignore_index: int) -> Tensor:
    """`tokens` as rows of this rank's shard; ignore_index for what lies elsewhere."""
    inside = (tokens >= shard.start) & (tokens < shard.start + n_local) & (tokens != ignore_index)
    return torch.where(inside, tokens - shard.start, ignore_index)


def gather_ranks(local: Tensor, shard: VocabShard) -> Tensor:
    """`local` of every rank, in their order, stacked in float64; only this rank's own has a gradient here."""
    own = local.double()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, own.detach().contiguous(), group=shard.group)
    parts[dist.get_rank(shard.group)] = own
    return torch.stack(parts)


def sum_over_ranks(local: Tensor, shard: VocabShard) -> Tensor:
    """Σ over the ranks, in their order."""
    return gather_ranks(local, shard).sum(0)


def fields_to_merge(fields: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics of a shard from which those of `fields` merge: expectations weigh by lse_p."""
    needs = any(INDEX[name] in EXPECTATIONS for name in fields) and "lse_p" not in fields
    return (*fields, "lse_p") if needs else fields


def merge_shards(local: dict[str, Tensor], shard: VocabShard) -> dict[str, Tensor]:
    """The statistics [N] of the whole vocabulary from those of each shard, float64.

    lse = log Σ_i exp(lse_i); E = Σ_i share_i · E_i with share_i = exp(lse_p,i − lse_p), where the level of
    E_p[z_p − lse_p] moves with lse_p. A shard that is masked throughout has no share.
    """
    ranks = dict(zip(local, gather_ranks(torch.stack(list(local.values())), shard).unbind(1), strict=True))
    merged: dict[str, Tensor] = {}
    for name, parts in ranks.items():
        if name in LSE_NAMES:
            merged[name] = torch.logsumexp(parts, 0)
        elif INDEX[name] in AT:
            merged[name] = parts.sum(0)
        else:
            gap = ranks["lse_p"] - torch.logsumexp(ranks["lse_p"], 0)
            means = parts + gap if INDEX[name] == E_PP else parts
            empty = torch.isneginf(ranks["lse_p"])
            share = gap.exp().masked_fill(empty, 0.0)
            merged[name] = (share * means.masked_fill(share == 0, 0.0)).sum(0)
            merged[name] = merged[name].masked_fill(empty.all(0), float("nan"))
    return merged
