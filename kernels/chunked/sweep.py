"""The sweep in blocks: vocabulary blocks outside, token chunks inside, every tile in one reused workspace."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.chunked import derivatives, sizes
from etpo.kernels.chunked.derivatives import TileCotangents
from etpo.kernels.chunked.heads import Casts, RowInputs, Tiling, open_heads, place_of, tiling_of
from etpo.kernels.chunked.statistics import MASKED, ROWS, Planes, Scratch, merge, mix_into, tile_statistics
from etpo.kernels.gradients import Gradients, Plan, Rows, plan_backward, planes_of
from etpo.kernels.operators import Cotangents, Rule, expect_gradient, head_tensors, make_operator
from etpo.kernels.plan import AT, INDEX, P, Q, U
from etpo.kernels.streams import Problem


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> list[Tensor]:
    """The named statistics of `problem`, each [N] float64. in_place: backward overwrites given logits."""
    indices = [INDEX[name] for name in fields]
    tensors = [t for source in problem.streams.values() for t in (source.hidden, *head_tensors(source))]
    keep = False
    if not problem.given_logits and expect_gradient(*tensors):
        # The logits are kept for backward where they are few; given logits are there anyway.
        n_logits = (len(_kept_streams(problem, indices)) + 1) * problem.n_rows * problem.n_vocab
        keep = bool(n_logits * problem.dtype.itemsize <= sizes.KEEP_BYTES[place_of(problem)])
    return OPERATOR(problem, [int(keep), *indices], len(fields), in_place=in_place)[: len(fields)]


def _kept_streams(problem: Problem, fields: Iterable[int]) -> list[int]:
    return sorted(planes_of(problem, fields) - {U})


class Kept(NamedTuple):
    """Logits held from forward to backward, by stream: a flat buffer, [rows, block] for block after block.

    rows: the positions among the rows held that a backward sweeps; None for all.
    """

    buffers: dict[int, Tensor]
    n_rows: int
    rows: Tensor | None

    def block(self, stream: int, columns: slice) -> Tensor:
        """The logits of one stream and block."""
        flat = self.buffers[stream][columns.start * self.n_rows : columns.stop * self.n_rows]
        return flat.view(self.n_rows, columns.stop - columns.start)


class Tile(NamedTuple):
    """Tokens `chunk` of those swept, by one vocabulary block: what the heads read, and made of it."""

    chunk: slice
    rows: Rows
    planes: Planes
    inputs: dict[int, RowInputs]
    tokens: Tensor | None
    scratch: Scratch


class Sweep:
    """The tiles of a problem, with the logits of the streams of `planes` and the heads of `streams` open."""

    def __init__(self, problem: Problem, tiling: Tiling, planes: set[int], streams: set[int]) -> None:
        self.problem = problem
        self.tiling = tiling
        self.planes = planes
        self.heads = open_heads(problem, streams)
        self.whole = tiling.block == tiling.n_vocab
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A tile of the workspace, the same memory for the same name."""
        if name not in self.buffers:
            size = self.tiling.chunk * self.tiling.block
            self.buffers[name] = torch.empty(size, dtype=self.problem.dtype, device=self.problem.device)
        return self.buffers[name][: shape[0] * shape[1]].view(shape)

    def block_tiles(self, columns: slice, kept: Kept, *, fill: bool) -> Iterator[Tile]:
        """The tiles of one block. Streams in `kept` are written to it (fill) or read from it."""
        casts: Casts = {}
        for head in self.heads.values():
            head.open_block(columns, casts)
        targets = self.problem.targets
        for chunk, rows in self.tiling.chunks():
            inputs = {k: head.read_rows(rows) for k, head in self.heads.items()}
            shape = (chunk.stop - chunk.start, columns.stop - columns.start)
            planes: Planes = {}
            for k in self.planes - {U}:
                if k not in kept.buffers:
                    planes[k] = self.heads[k].logits(inputs[k], self.buffer(f"z{k}", shape))
                elif fill:
                    planes[k] = self.heads[k].logits(inputs[k], kept.block(k, columns)[chunk])
                elif kept.rows is None:
                    planes[k] = kept.block(k, columns)[chunk]
                else:
                    out = self.buffer(f"z{k}", shape)
                    planes[k] = torch.index_select(kept.block(k, columns), 0, kept.rows[chunk], out=out)
            if U in self.planes:
                planes[U] = mix_into(self.buffer("zu", shape), planes, self.problem.mix)
            tokens = None if targets is None else targets[rows] - columns.start
            scratch = Scratch(*(self.buffer(name, shape) for name in Scratch._fields))
            yield Tile(chunk, rows, planes, inputs, tokens, scratch)


def empty(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The statistics, the table that they stand in, and the logits to be kept, without values."""
    keep, *fields = task
    hidden = next(iter(problem.streams.values())).hidden
    stats = [hidden.new_empty(problem.n_rows, dtype=torch.float64) for _ in fields]
    n_kept = len(_kept_streams(problem, fields)) if keep else 0
    size = problem.n_rows * problem.n_vocab
    kept = [hidden.new_empty(size, dtype=problem.dtype) for _ in range(n_kept)]
    return [*stats, hidden.new_empty((ROWS, problem.n_rows), dtype=torch.float64), *kept]


def _real_rows(problem: Problem) -> Tensor | None:
    """True for the tokens that count, [N]; None where all do."""
    return None if problem.targets is None else problem.targets != problem.ignore_index


def forward(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """What `empty` lists: the statistics of `task`, their table [ROWS, N], and the logits that are kept."""
    _, *asked = task
    fields = set(asked)
    kept = dict(zip(_kept_streams(problem, fields), empty(problem, task)[len(asked) + 1 :], strict=False))
    tiling = tiling_of(problem, _real_rows(problem))
    table = torch.zeros(ROWS, tiling.n_rows, dtype=torch.float64, device=problem.device)
    planes = planes_of(problem, fields)
    tiles = Sweep(problem, tiling, planes, planes)
    for columns in tiling.blocks():
        for tile in tiles.block_tiles(columns, Kept(kept, tiling.n_rows, None), fill=True):
            part = tile_statistics(tile.planes, fields, tile.tokens, tiles.whole, tile.scratch)
            old = table[:, tile.chunk]
            table[:, tile.chunk] = part if columns.start == 0 else merge(old, part)
    if tiling.swept is not None:
        full = torch.zeros(ROWS, problem.n_rows, dtype=torch.float64, device=problem.device)
        table = full.index_copy_(1, tiling.swept, table)
    return [*(table[k].clone() for k in asked), table, *kept.values()]


def backward(problem: Problem, task: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for; the logits are read from what was kept, or made again."""
    _, *asked = task
    stats, *kept_list = cotangents.made[len(asked) :]
    g = torch.zeros_like(stats)
    for k, cotangent in cotangents.g.items():
        g[asked[k]] += cotangent
    sink = Gradients(cotangents.wanted, problem.dtype, in_place=cotangents.in_place)
    real = _real_rows(problem)
    nonzero = g != 0
    active_rows = nonzero.any(0) if real is None else nonzero.any(0) & real
    active = {k for k, any_row in enumerate(nonzero.any(1).tolist()) if any_row}
    tiling = tiling_of(problem, active_rows)
    streams = sink.streams_of(problem)
    plan = plan_backward(problem, active, streams)
    kept = _held_rows(
        dict(zip(_kept_streams(problem, asked), kept_list, strict=False)), g.shape[1], real, tiling
    )
    if cotangents.in_place:
        _zero_unswept(problem, streams, plan.grads, active_rows)
    if tiling.swept is not None:
        g, stats = g[:, tiling.swept], stats[:, tiling.swept]
    masked = bool(stats[MASKED].any())
    tiles = Sweep(problem, tiling, plan.planes, plan.planes | plan.grads)
    for columns in tiling.blocks() if plan.grads else ():
        for tile in tiles.block_tiles(columns, kept, fill=False):
            cot = TileCotangents(g[:, tile.chunk], stats[:, tile.chunk], active, masked)
            for k, dz in _tile_gradients(tiles, tile, cot, plan):
                z = tile.planes.get(k)
                tiles.heads[k].backward(dz, z, tile.inputs[k], tile.rows, sink, tile.scratch.terms)
        sink.close_blocks()
    return [] if cotangents.in_place else sink.results()


def _tile_gradients(
    tiles: Sweep, tile: Tile, cot: TileCotangents, plan: Plan
) -> Iterator[tuple[int, Tensor]]:
    """(stream, dz) of a tile. Each dz lasts until the next is asked for."""
    a, b = tiles.problem.mix
    scratch, whole = tile.scratch, tiles.whole
    shape = (scratch.prob.shape[0], scratch.prob.shape[1])
    prob_u = tiles.buffer("prob_u", shape) if plan.prob_u else scratch.prob
    softmax = derivatives.softmaxes(tile.planes, cot, plan, scratch.prob, prob_u, whole)
    for k in sorted(plan.grads):
        if k == P:
            dz = derivatives.policy_gradient(tile.planes, cot, softmax, scratch)
        else:
            share = b if k == Q else a
            dz = derivatives.other_gradient(k, share, tile.planes, cot, softmax, scratch, whole)
        if AT[k] in cot.active and tile.tokens is not None:
            derivatives.add_at_tokens(dz, cot.g[AT[k]], tile.tokens, whole)
        yield k, dz


def _held_rows(buffers: dict[int, Tensor], n_rows: int, real: Tensor | None, tiling: Tiling) -> Kept:
    """Logits that a forward over the rows `real` filled, as a backward reads those of `tiling`."""
    if not buffers or real is None:
        return Kept(buffers, n_rows, tiling.swept)
    held = real.nonzero()[:, 0]
    if tiling.swept is None or tiling.swept.shape == held.shape:
        return Kept(buffers, held.shape[0], None)
    return Kept(buffers, held.shape[0], torch.searchsorted(held, tiling.swept))


def _zero_unswept(problem: Problem, streams: set[int], swept: set[int], active_rows: Tensor) -> None:
    """Zeros what a backward in place leaves of the logits: streams without a gradient, and dead rows."""
    dead = (~active_rows).nonzero()[:, 0]
    for k in streams:
        logits = problem.streams[k].hidden
        if k in swept:
            logits.index_fill_(0, dead, 0.0)
        else:
            logits.zero_()


OPERATOR = make_operator("sweep", Rule(forward, empty, backward))
