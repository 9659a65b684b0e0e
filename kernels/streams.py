"""What goes into a vocabulary sweep and what comes out: streams, statistics, the checked problem."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]


class VocabShard(NamedTuple):
    """The rows [start, start + V_local) of a vocabulary, of which each rank of a process group holds some.

    group: a torch.distributed process group; None for the default one. The shards lie end to end in the order
    of the ranks.
    """

    group: Any
    start: int


class Stream(NamedTuple):
    """One language-model head and the hidden states it reads.

        z = softcap · tanh((h·Wᵀ + scale·(h·Aᵀ)·Bᵀ + bias) / softcap) / temperature

    hidden: [N, D] or [B, T, D]; weight: [V, D], of the dtype of hidden or float32; bias: [V]; lora: (A
    [R, D], B [V, R], scale), a low-rank change of the head; temperature > 0; softcap > 0, or None. Dtypes are
    float64 (all tensors, or none), float32, bfloat16 and float16; bias and lora may differ in dtype from
    weight. shard: where weight, bias and B are this rank's rows of a sharded vocabulary; hidden and A are
    then the same on every rank, results too, and a token costs a dozen numbers of communication. A weight
    that is a DTensor sharded on dim 0 is taken as such.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora: Lora | None = None
    temperature: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None


class VocabStats(NamedTuple):
    """Statistics of the vocabulary at each token, [N] or [B, T]; None where a stream or targets are absent.

    lse_*: log-sum-exp of the logits of the policy p, critic q, reference r, and of u = a·z_r + b·z_q.
    e_pr = E_p[z_p − z_r], e_pu = E_p[z_p − u], e_pp = E_p[z_p − lse_p] (minus the entropy), e_q = E_p[z_q].
    at_*: the logit of the target token. Float32; float64 for float64 inputs.
    """

    lse_p: Tensor | None
    lse_q: Tensor | None
    lse_r: Tensor | None
    lse_u: Tensor | None
    e_pr: Tensor | None
    e_pu: Tensor | None
    e_pp: Tensor | None
    e_q: Tensor | None
    at_p: Tensor | None
    at_q: Tensor | None
    at_r: Tensor | None


class Source(NamedTuple):
    """A checked stream, flat: hidden [N, D] and its head, or, with weight None, logits [N, V] in `hidden`."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    lora: Lora | None = None
    temperature: float = 1.0
    softcap: float | None = None


class Problem(NamedTuple):
    """A checked sweep, the argument of every backend.

    sources: policy, critic, reference; streams: those that are there, by index (plan.P, Q, R). targets: [N]
    int64; a row counts unless its target is ignore_index (for a gather [N·K], K to a row). weights: [N] of a
    sum over the rows, or None. mixed: the streams of u. dtype: of logits and results.
    """

    sources: tuple[Source | None, Source | None, Source | None]
    streams: dict[int, Source]
    targets: Tensor | None
    weights: Tensor | None
    mix: tuple[float, float]
    mixed: frozenset[int]
    ignore_index: int
    n_rows: int
    n_vocab: int
    dtype: torch.dtype
    device: torch.device
    given_logits: bool
    shard: VocabShard | None
