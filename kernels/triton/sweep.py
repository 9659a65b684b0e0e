"""The Triton sweeps, forward and backward: pieces that fit a bounded workspace, and what becomes of each.

Imports triton, so it is itself imported at first use only.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from etpo.kernels.gradients import COLUMNS, ROWS, Gradients
from etpo.kernels.plan import plan_backward
from etpo.kernels.streams import Problem, Source
from etpo.kernels.triton import sizes as config
from etpo.kernels.triton.launch import Backward, forward_launches, run, target_of


def forward(problem: Problem, fields: list[int]) -> list[Tensor]:
    """The statistics `fields`, [N] float64 each."""
    hidden = problem.first.hidden
    outs = {k: torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device) for k in fields}
    if hidden.shape[0]:
        run(forward_launches(problem, outs, target_of(hidden)), hidden)
    return [outs[k] for k in fields]


class Pieces(NamedTuple):
    """How a backward is cut: vocabulary blocks outside, token chunks inside."""

    n_rows: int
    n_vocab: int
    chunk: int
    block: int

    def blocks(self) -> Iterator[slice]:
        return (slice(v, min(v + self.block, self.n_vocab)) for v in range(0, self.n_vocab, self.block))

    def chunks(self) -> Iterator[slice]:
        return (slice(n, min(n + self.chunk, self.n_rows)) for n in range(0, self.n_rows, self.chunk))


def pieces_of(problem: Problem, entry_bytes: int, tile: config.Tile, *, heads: bool) -> Pieces:
    """Whole rows where no head is trained, so that ∂/∂hidden is one product; else few vocabulary blocks.

    entry_bytes: of the derivatives at one token and one vocabulary entry.
    """
    n_rows, n_vocab = problem.first.hidden.shape[0], problem.first.n_vocab
    elements = config.DZ_BYTES // entry_bytes
    if not heads:
        rows = max(tile.block_n, elements // n_vocab // tile.block_n * tile.block_n)
        return Pieces(n_rows, n_vocab, min(n_rows, rows), n_vocab)
    rows = min(n_rows, config.DZ_ROWS)
    columns = max(tile.block_v, elements // rows // tile.block_v * tile.block_v)
    return Pieces(n_rows, n_vocab, rows, min(n_vocab, columns))


def dz_dtype(sources: Iterable[Source]) -> torch.dtype:
    """bf16 has the range of float32, so bf16 matrices get it; float16 would lose what is small.

    A float32 stream beside them keeps its precision; `multiply` rounds what meets a bf16 matrix.
    """
    dtypes = {source.hidden.dtype for source in sources}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def backward(
    problem: Problem, g: dict[int, Tensor], stats: dict[int, Tensor], wanted: list[Tensor], *, in_place: bool
) -> list[Tensor]:
    """Gradients of `wanted` from the cotangents g of the statistics that `forward` returned, [N] float64.

    in_place: the gradients of given logits overwrite them, and nothing is returned.
    """
    hidden = problem.first.hidden
    sink = Gradients(wanted)
    streams = {k for k, source in enumerate(problem.sources) if source is not None and sink.wants(source)}
    plan = plan_backward(problem, set(g), streams)
    kernel = Backward(problem, g, stats, plan, target_of(hidden))
    if problem.first.weight is None:
        return _logits_backward(kernel, wanted, in_place=in_place)
    if not plan.grads or hidden.shape[0] == 0:
        return sink.results()
    sources = {
        k: source for k, source in enumerate(problem.sources) if source is not None and k in plan.grads
    }
    heads = any(sink.wants_head(source) for source in sources.values())
    live = live_rows(problem, g) if heads else None
    dtype = dz_dtype(sources.values())
    pieces = pieces_of(problem, len(sources) * dtype.itemsize, kernel.inputs.tile, heads=heads)
    sink.whole_rows = pieces.block == pieces.n_vocab
    # Rows of a multiple of 128 bytes keep the matrix products on their fast path.
    shape = (len(sources), pieces.chunk, triton.cdiv(pieces.block, 64) * 64)
    space = torch.empty(shape, dtype=dtype, device=hidden.device)
    for columns in pieces.blocks():
        for rows in pieces.chunks():
            n, m = rows.stop - rows.start, columns.stop - columns.start
            dz = {k: space[i, :n, :m] for i, k in enumerate(sources)}
            run([kernel.launch(dz, rows, columns)], hidden)
            for k, tile in dz.items():
                sink.add(sources[k], tile, rows, columns, live)
            sink.close(ROWS)
        sink.close(COLUMNS)
    return sink.results()


def live_rows(problem: Problem, g: dict[int, Tensor]) -> Tensor:
    """True for the tokens that count and have a cotangent, [N]."""
    live = torch.stack(list(g.values())).ne(0).any(0)
    return live if problem.targets is None else live & (problem.targets != problem.ignore_index)


def _logits_backward(kernel: Backward, wanted: list[Tensor], *, in_place: bool) -> list[Tensor]:
    """The gradients of given logits: the kernel writes them, and the matrix products fall away."""
    problem = kernel.problem
    outs = [z if in_place else torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in wanted]
    goals = {id(z): out for z, out in zip(wanted, outs, strict=True)}
    n_rows, n_vocab = problem.first.hidden.shape[0], problem.first.n_vocab
    dz: dict[int, Tensor] = {}
    sums: dict[int, list[Tensor]] = {key: [] for key in goals}
    for k in sorted(kernel.grads):
        source = problem.sources[k]
        assert source is not None
        key = id(source.hidden)
        uses = sum(other is not None and other.hidden is source.hidden for other in problem.sources)
        if uses == 1 and goals[key].stride(1) == 1:
            dz[k] = goals.pop(key)
        else:
            # The kernel stores rows whose columns lie next to each other, and each stream on its own.
            dz[k] = torch.empty(goals[key].shape, dtype=torch.float32, device=goals[key].device)
            sums[key].append(dz[k])
    if dz and n_rows:
        run([kernel.launch(dz, slice(0, n_rows), slice(0, n_vocab))], problem.first.hidden)
    for key, goal in goals.items():
        if sums[key]:
            goal.copy_(torch.stack(sums[key]).sum(0))
        else:
            goal.zero_()
    if not in_place:
        return outs
    # A kernel writes unseen by autograd, which has to refuse whoever still needs these logits.
    for z in wanted:
        torch.autograd.graph.increment_version(z)
    return []
