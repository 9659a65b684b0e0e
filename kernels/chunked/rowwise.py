"""Functions of one number a token, over whole rows at a time: the derivative is made in the forward sweep.

With one number a token, a cotangent only scales a token's derivative. So the forward sweep leaves either the
derivative by the hidden states (frozen heads), or, where they are few, the derivative by the logits; backward
scales it row by row, and recomputes nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked import derivatives
from etpo.kernels.chunked import statistics as tiles
from etpo.kernels.chunked import sweep as blocks
from etpo.kernels.chunked.heads import Gradients, Head, product
from etpo.kernels.plan import P, Q, R
from etpo.kernels.streams import Problem

KL, LOG_RATIO = range(2)

# Every chunk reads the whole heads, so few rows are slow; two planes of a chunk's logits are the workspace.
CHUNK_ROWS = 384
PLANE_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}
# Planes larger than KEEP_BYTES stay well below the logits of all tokens: these make as many chunks at least.
FEWEST_CHUNKS = 3
# Two threads share a product evenly where its rows come in such groups.
ROW_GROUP = 16


class Part(NamedTuple):
    """A derivative by the logits of a stream: share · ∂/∂(plane)."""

    stream: int
    share: float
    plane: int


def parts_of(problem: Problem, kind: int) -> list[Part]:
    """How the derivatives by the planes give those by the streams. Planes: 0 p or r, 1 u.

    KL(p ‖ u) has planes p and u; lse_u − lse_r has planes r and u.
    """
    a, b = problem.mix
    shared = [Part(R, a, 1), Part(Q, b, 1)]
    return [Part(P if kind == KL else R, 1.0, 0), *(part for part in shared if part.share != 0)]


def forward(
    problem: Problem, kind: int, hidden_grads: dict[int, Tensor], logit_grads: dict[int, Tensor]
) -> Tensor:
    """KL(p ‖ softmax u), or lse_u − lse_r, [N] float64; u = a·z_r + b·z_q. Heads have no softcap and no lora.

    hidden_grads: by stream, [N, D] to which ∂/∂hidden is written. logit_grads: by plane, [N, V] to which the
    derivative by the plane is written.
    """
    n_rows, n_vocab = problem.first.hidden.shape[0], problem.first.n_vocab
    device, dtype = problem.first.hidden.device, problem.dtype
    place = blocks.place_of(problem.first.hidden)
    chunk = chunk_rows(n_rows, n_vocab, dtype.itemsize, place)
    # The softmaxes of p and of u share one tile.
    step = min(chunk, max(4, blocks.TILE_ELEMENTS[place] // 2 // n_vocab))
    heads = open_heads(problem, 0, n_vocab)
    parts = parts_of(problem, kind)
    mixed = [part for part in parts if part.plane == 1]
    want_u = 1 in logit_grads or any(part.stream in hidden_grads for part in mixed)
    spare = torch.empty(2, chunk, n_vocab, dtype=dtype, device=device)
    scratch = torch.empty(2, step, n_vocab, dtype=dtype, device=device)
    numbers = torch.empty(n_rows, dtype=torch.float64, device=device)
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        rows = slice(start, stop)
        planes = [logit_grads[i][rows] if i in logit_grads else spare[i, : stop - start] for i in range(2)]
        _fill(planes[0], heads, [part for part in parts if part.plane == 0], rows)
        _fill(planes[1], heads, mixed, rows)
        for first in range(0, stop - start, step):
            first_plane, u = planes[0][first : first + step], planes[1][first : first + step]
            prob, prob_u = scratch[0, : u.shape[0]], scratch[1, : u.shape[0]]
            if kind == KL:
                value = tiles.kl_rows(first_plane, u, prob, prob_u, want_u=want_u)
            else:
                value = tiles.log_ratio_rows(first_plane, u, prob)
            numbers[start + first : start + first + u.shape[0]] = value
        for stream, grad in hidden_grads.items():
            own = [part for part in parts if part.stream == stream]
            for k, part in enumerate(own):
                alpha = part.share / heads[stream].source.temperature
                weight = heads[stream].weight_block
                product(grad[rows], planes[part.plane], weight, accumulate=k > 0, alpha=alpha)
    return numbers


def chunk_rows(n_rows: int, n_vocab: int, itemsize: int, place: str) -> int:
    """Tokens of a chunk: chunks of about one size, as few as the workspace and its share allow."""
    most = max(1, min(n_rows, CHUNK_ROWS, PLANE_ELEMENTS[place] // n_vocab))
    small = 2 * n_rows * n_vocab * itemsize <= blocks.KEEP_BYTES
    n_chunks = max(1 if small else FEWEST_CHUNKS, -(-n_rows // most))
    return max(1, min(most, -(-n_rows // (n_chunks * ROW_GROUP)) * ROW_GROUP))


def open_heads(problem: Problem, start: int, stop: int) -> dict[int, Head]:
    """The heads of `problem` by stream, with block [start, stop) open."""
    heads = {k: Head(source, problem.dtype) for k, source in enumerate(problem.sources) if source is not None}
    casts: dict[int, Tensor] = {}
    for head in heads.values():
        head.open_block(start, stop, casts)
    return heads


def _fill(plane: Tensor, heads: dict[int, Head], parts: list[Part], rows: slice) -> None:
    """plane = Σ share · logits over `parts`, in one product where their heads are the same."""
    terms = [
        (heads[part.stream], heads[part.stream].read_rows(rows).hidden, part.share, part.share)
        for part in parts
    ]
    if len(terms) == 2 and _same_head(terms[0][0], terms[1][0]):
        (head, hidden, share, _), (_, other_hidden, other_share, _) = terms
        terms = [(head, hidden * share + other_hidden * other_share, 1.0, share + other_share)]
    n_vocab, place = plane.shape[1], blocks.place_of(plane)
    # A CPU multiplies few rows faster by blocks of the head that stay in its cache.
    width = blocks.BLOCK_COLUMNS[place] if place == "cpu" else n_vocab
    for start in range(0, n_vocab, width):
        columns = slice(start, min(start + width, n_vocab))
        for k, (head, hidden, share, bias_share) in enumerate(terms):
            head.add_logits(hidden, share, bias_share, plane, columns, accumulate=k > 0)


def _same_head(one: Head, other: Head) -> bool:
    """True where both heads are one linear map of the hidden states, taken in the dtype of the logits."""
    a, b = one.source, other.source
    same = a.weight is b.weight and a.bias is b.bias and a.temperature == b.temperature
    return same and one.weight_block.dtype == one.dtype


def backward(
    problem: Problem, kind: int, g: Tensor, logit_grads: dict[int, Tensor], wanted: list[Tensor]
) -> list[Tensor]:
    """Gradients of `wanted` from the cotangent g [N] and the derivatives by the planes, [N, V] each."""
    tiling = blocks.tiling_of(problem, g != 0)
    sink = Gradients(wanted, problem.dtype)
    parts = [part for part in parts_of(problem, kind) if part.plane in logit_grads]
    streams = [k for k, source in enumerate(problem.sources) if source is not None and sink.wants(source)]
    device = g.device
    spare = torch.empty(2, tiling.chunk * tiling.block, dtype=problem.dtype, device=device)
    for start, stop in tiling.blocks():
        heads = open_heads(problem, start, stop)
        for first, last, rows in tiling.chunks():
            shape = (last - first, stop - start)
            dz, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in spare)
            for stream in streams:
                terms = [
                    (logit_grads[part.plane][rows, start:stop], part.share * g[rows])
                    for part in parts
                    if part.stream == stream
                ]
                derivatives.weighted_sum(dz, terms)
                heads[stream].backward(dz, None, heads[stream].read_rows(rows), rows, sink, scratch)
        sink.close_block()
    return sink.results()
