"""The chunked sweep: vocabulary blocks outside, token chunks inside, every tile in one reused workspace.

A block of a head is cast to the dtype of the logits once a call; memory does not grow with the tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked import derivatives
from etpo.kernels.chunked import statistics as tiles
from etpo.kernels.chunked.derivatives import Cotangents
from etpo.kernels.chunked.heads import Gradients, Head, InPlaceGradients, RowInputs, Rows
from etpo.kernels.chunked.statistics import Planes, Scratch
from etpo.kernels.plan import AT, P, Plan, Q, R, U, forward_planes, plan_backward
from etpo.kernels.streams import Problem

# Large enough for the matrix products, small enough for a core's cache.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
BLOCK_COLUMNS = {"cpu": 1024, "cuda": 8192}
# Logits stay from forward to backward where they, and one plane more to work on, are no larger: a workspace.
KEEP_BYTES = 1 << 25


class Tiling(NamedTuple):
    """How a sweep over n_rows tokens (all, or those listed in `swept`) is cut."""

    n_rows: int
    n_vocab: int
    chunk: int
    block: int
    swept: Tensor | None

    def blocks(self) -> Iterator[tuple[int, int]]:
        return ((v, min(v + self.block, self.n_vocab)) for v in range(0, self.n_vocab, self.block))

    def chunks(self) -> Iterator[tuple[int, int, Rows]]:
        """(start, stop) among the tokens swept, and the rows of the inputs that these are."""
        for start in range(0, self.n_rows, self.chunk):
            stop = min(start + self.chunk, self.n_rows)
            yield start, stop, slice(start, stop) if self.swept is None else self.swept[start:stop]


def place_of(tensor: Tensor) -> str:
    """The key of `tensor`'s device in the tables of sizes."""
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def tiling_of(problem: Problem, active: Tensor | None) -> Tiling:
    """The tiling of `problem` over the rows where `active` [N] is True; None means all."""
    first = problem.first
    n_rows, n_vocab = first.hidden.shape[0], first.n_vocab
    index = None
    if active is not None and not bool(active.all()):
        index = active.nonzero()[:, 0]
        n_rows = index.shape[0]
    kind = place_of(first.hidden)
    # Given logits need no product, and their rows lie whole in memory.
    block = n_vocab if first.weight is None else min(n_vocab, BLOCK_COLUMNS[kind])
    chunk = max(1, min(n_rows, TILE_ELEMENTS[kind] // block))
    return Tiling(n_rows, n_vocab, chunk, block, index)


def real_rows(problem: Problem) -> Tensor | None:
    """True for the tokens that count, [N]; None where all do."""
    return None if problem.targets is None else problem.targets != problem.ignore_index


class Kept(NamedTuple):
    """Logits held from forward to backward, by stream: a flat buffer, [rows, block] for block after block.

    rows: the positions among the rows held that a backward sweeps; None for all.
    """

    buffers: dict[int, Tensor]
    n_rows: int
    rows: Tensor | None

    def block(self, stream: int, start: int, stop: int) -> Tensor:
        flat = self.buffers[stream][start * self.n_rows : stop * self.n_rows]
        return flat.view(self.n_rows, stop - start)


class Tile(NamedTuple):
    """Tokens [start, stop) of those swept, by one vocabulary block: what the heads read, and made of it."""

    start: int
    stop: int
    rows: Rows
    planes: Planes
    inputs: list[RowInputs | None]
    tokens: Tensor | None


class Sweep:
    """The tiles of a problem, with the logits of the streams of `planes` and the heads of `heads` open."""

    def __init__(self, problem: Problem, tiling: Tiling, planes: set[int], heads: set[int]) -> None:
        self.problem = problem
        self.tiling = tiling
        self.planes = planes
        self.heads = {
            k: Head(source, problem.dtype)
            for k, source in enumerate(problem.sources)
            if source is not None and k in heads
        }
        self.whole = tiling.block == tiling.n_vocab
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A tile of the workspace, the same memory for the same name."""
        if name not in self.buffers:
            size = self.tiling.chunk * self.tiling.block
            device = self.problem.first.hidden.device
            self.buffers[name] = torch.empty(size, dtype=self.problem.dtype, device=device)
        return self.buffers[name][: shape[0] * shape[1]].view(shape)

    def scratch(self, shape: tuple[int, int]) -> Scratch:
        return Scratch(*(self.buffer(name, shape) for name in Scratch._fields))

    def block_tiles(self, start: int, stop: int, kept: Kept, *, fill: bool) -> Iterator[Tile]:
        """The tiles of block [start, stop). Streams in `kept` are written to it (fill) or read from it."""
        casts: dict[int, Tensor] = {}
        for head in self.heads.values():
            head.open_block(start, stop, casts)
        targets = self.problem.targets
        for first, last, rows in self.tiling.chunks():
            inputs = [self.heads[k].read_rows(rows) if k in self.heads else None for k in (P, Q, R)]
            shape = (last - first, stop - start)
            z: list[Tensor | None] = [None] * 4
            for k in self.planes - {U}:
                row_inputs = inputs[k]
                assert row_inputs is not None
                if k not in kept.buffers:
                    z[k] = self.heads[k].logits(row_inputs, self.buffer(f"z{k}", shape))
                elif fill:
                    z[k] = self.heads[k].logits(row_inputs, kept.block(k, start, stop)[first:last])
                elif kept.rows is None:
                    z[k] = kept.block(k, start, stop)[first:last]
                else:
                    out = self.buffer(f"z{k}", shape)
                    z[k] = torch.index_select(kept.block(k, start, stop), 0, kept.rows[first:last], out=out)
            if U in self.planes:
                z[U] = tiles.mix_into(self.buffer("zu", shape), z[Q], z[R], self.problem.mix)
            tokens = None if targets is None else targets[rows] - start
            yield Tile(first, last, rows, Planes(*z), inputs, tokens)


def forward(problem: Problem, fields: set[int], kept: dict[int, Tensor]) -> Tensor:
    """The statistics `fields`, [ROWS, N] float64.

    kept: flat buffers of N·V elements, by stream, that are filled with logits for `backward`.
    """
    tiling = tiling_of(problem, real_rows(problem))
    hidden = problem.first.hidden
    table = torch.zeros(tiles.ROWS, tiling.n_rows, dtype=torch.float64, device=hidden.device)
    planes = forward_planes(fields, problem.mix)
    sweep = Sweep(problem, tiling, planes, planes)
    for start, stop in tiling.blocks():
        for tile in sweep.block_tiles(start, stop, Kept(kept, tiling.n_rows, None), fill=True):
            scratch = sweep.scratch((tile.stop - tile.start, stop - start))
            part = tiles.tile_statistics(tile.planes, fields, tile.tokens, sweep.whole, scratch)
            rows = slice(tile.start, tile.stop)
            table[:, rows] = part if start == 0 else tiles.merge(table[:, rows], part)
    if tiling.swept is None:
        return table
    full = torch.zeros(tiles.ROWS, hidden.shape[0], dtype=torch.float64, device=hidden.device)
    return full.index_copy_(1, tiling.swept, table)


def backward(
    problem: Problem,
    g: Tensor,
    stats: Tensor,
    kept: dict[int, Tensor],
    wanted: list[Tensor],
    *,
    in_place: bool,
) -> list[Tensor]:
    """Gradients of `wanted`, from the cotangents g [ROWS, N] of the statistics that `forward` returned.

    in_place: the gradients of given logits overwrite them, and nothing is returned.
    """
    sink: Gradients = (InPlaceGradients if in_place else Gradients)(wanted, problem.dtype)
    real = real_rows(problem)
    nonzero = g != 0
    active_rows = nonzero.any(0) if real is None else nonzero.any(0) & real
    active = {k for k, any_row in enumerate(nonzero.any(1).tolist()) if any_row}
    tiling = tiling_of(problem, active_rows)
    streams = {k for k, source in enumerate(problem.sources) if source is not None and sink.wants(source)}
    plan = plan_backward(problem, active, streams)
    held = Kept(kept, g.shape[1], tiling.swept)
    if kept and real is not None:
        held = _held_rows(kept, real, tiling.swept)
    if in_place:
        _zero_unswept(problem, streams - plan.grads, streams & plan.grads, active_rows)
    if tiling.swept is not None:
        g, stats = g[:, tiling.swept], stats[:, tiling.swept]
    masked = bool(stats[tiles.MASKED].any())
    sweep = Sweep(problem, tiling, plan.planes, plan.planes | plan.grads)
    for start, stop in tiling.blocks() if plan.grads else ():
        for tile in sweep.block_tiles(start, stop, held, fill=False):
            rows = slice(tile.start, tile.stop)
            cot = Cotangents(g[:, rows], stats[:, rows], active, masked)
            scratch = sweep.scratch((tile.stop - tile.start, stop - start))
            for k, dz in _tile_gradients(sweep, tile, cot, plan, scratch):
                row_inputs = tile.inputs[k]
                assert row_inputs is not None
                sweep.heads[k].backward(dz, tile.planes[k], row_inputs, tile.rows, sink, scratch.terms)
        sink.close_block()
    return [] if in_place else sink.results()


def _tile_gradients(
    sweep: Sweep, tile: Tile, cot: Cotangents, plan: Plan, scratch: Scratch
) -> Iterator[tuple[int, Tensor]]:
    """(stream, dz) of a tile. Each dz lasts until the next is asked for."""
    a, b = sweep.problem.mix
    n_rows, n_columns = scratch.prob.shape
    prob_u = sweep.buffer("prob_u", (n_rows, n_columns)) if plan.prob_u else None
    softmax = derivatives.softmaxes(tile.planes, cot, plan, scratch.prob, prob_u, sweep.whole)
    for k in sorted(plan.grads):
        if k == P:
            dz = derivatives.policy_gradient(tile.planes, cot, softmax, scratch)
        else:
            share = b if k == Q else a
            dz = derivatives.other_gradient(k, share, tile.planes[k], cot, softmax, scratch, sweep.whole)
        if AT[k] in cot.active and tile.tokens is not None:
            derivatives.add_at_tokens(dz, cot.g[AT[k]], tile.tokens, sweep.whole)
        yield k, dz


def _held_rows(kept: dict[int, Tensor], real: Tensor, index: Tensor | None) -> Kept:
    """`kept`, which a forward over the rows `real` filled, as a backward over the rows `index` reads it."""
    held = real.nonzero()[:, 0]
    if index is None or index.shape == held.shape:
        return Kept(kept, held.shape[0], None)
    return Kept(kept, held.shape[0], torch.searchsorted(held, index))


def _zero_unswept(problem: Problem, untouched: set[int], touched: set[int], active_rows: Tensor) -> None:
    """Zeros what a backward in place leaves of the logits: streams without a gradient, and dead rows."""
    dead = (~active_rows).nonzero()[:, 0]
    for k, source in enumerate(problem.sources):
        if source is not None and k in untouched:
            source.hidden.zero_()
        elif source is not None and k in touched:
            source.hidden.index_fill_(0, dead, 0.0)
