"""The chunked sweep: vocabulary blocks outside, token chunks inside, every tile in one reused workspace.

A block of a head is cast to the dtype of the logits once a call; memory does not grow with the number of tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels import tiles
from etpo.kernels.heads import Gradients, Head, InPlaceGradients, RowInputs, Rows
from etpo.kernels.streams import Problem
from etpo.kernels.tiles import Cotangents, Planes, Scratch

# Large enough for the matrix products, small enough for a core's cache.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
BLOCK_COLUMNS = {"cpu": 1024, "cuda": 8192}

P, Q, R, U = range(4)
LSE = (tiles.LSE_P, tiles.LSE_Q, tiles.LSE_R, tiles.LSE_U)
AT = (tiles.AT_P, tiles.AT_Q, tiles.AT_R)


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


def tiling_of(problem: Problem, active: Tensor | None) -> Tiling:
    """The tiling of `problem` over the rows where `active` [N] is True; None means all."""
    first = problem.first
    n_rows, n_vocab = first.hidden.shape[0], first.n_vocab
    index = None
    if active is not None and not bool(active.all()):
        index = active.nonzero()[:, 0]
        n_rows = index.shape[0]
    kind = "cpu" if first.hidden.device.type == "cpu" else "cuda"
    # Given logits need no product, and their rows lie whole in memory.
    block = n_vocab if first.weight is None else min(n_vocab, BLOCK_COLUMNS[kind])
    chunk = max(1, min(n_rows, TILE_ELEMENTS[kind] // block))
    return Tiling(n_rows, n_vocab, chunk, block, index)


def real_rows(problem: Problem) -> Tensor | None:
    """True for the tokens that count, [N]; None where all do."""
    return None if problem.targets is None else problem.targets != problem.ignore_index


class Kept(NamedTuple):
    """Logits held from forward to backward: for each stream a flat buffer, [rows, block] for block after block.

    rows: the positions among the rows held that a backward sweeps; None for all.
    """

    buffers: dict[int, Tensor]
    n_rows: int
    rows: Tensor | None

    def block(self, stream: int, start: int, stop: int) -> Tensor:
        flat = self.buffers[stream][start * self.n_rows : stop * self.n_rows]
        return flat.view(self.n_rows, stop - start)


class Tile(NamedTuple):
    """Tokens [start, stop) of those swept by one vocabulary block, and what the heads read and made of them."""

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


def forward_planes(fields: set[int], mix: tuple[float, float]) -> set[int]:
    """The planes that the statistics `fields` read; u stands on those of its streams."""
    planes = set()
    if not fields.isdisjoint((tiles.LSE_P, tiles.AT_P, *tiles.EXPECTATIONS)):
        planes.add(P)
    if not fields.isdisjoint((tiles.LSE_Q, tiles.AT_Q, tiles.E_Q)):
        planes.add(Q)
    if not fields.isdisjoint((tiles.LSE_R, tiles.AT_R, tiles.E_PR)):
        planes.add(R)
    if not fields.isdisjoint((tiles.LSE_U, tiles.E_PU)):
        planes |= u_planes(mix)
    return planes


def u_planes(mix: tuple[float, float]) -> set[int]:
    """u and the streams that it mixes."""
    return {U} | {k for k, coefficient in zip((R, Q), mix, strict=True) if coefficient != 0}


class Plan(NamedTuple):
    """What a backward makes: the streams that get a gradient, the planes and softmaxes that this takes."""

    grads: set[int]
    planes: set[int]
    prob: bool
    prob_u: bool


def plan_backward(problem: Problem, active: set[int], wanted: set[int]) -> Plan:
    """The work for cotangents on the statistics `active` where the streams `wanted` ask for a gradient."""
    a, b = problem.mix
    own: dict[int, set[int]] = {
        P: {tiles.LSE_P, tiles.AT_P, *tiles.EXPECTATIONS},
        Q: {tiles.LSE_Q, tiles.AT_Q, tiles.E_Q},
        R: {tiles.LSE_R, tiles.AT_R, tiles.E_PR},
    }
    under_p = {P: {tiles.LSE_P, *tiles.EXPECTATIONS}, Q: {tiles.E_Q}, R: {tiles.E_PR}}
    for k, coefficient in ((Q, b), (R, a)):
        if coefficient != 0:
            own[k] |= {tiles.LSE_U, tiles.E_PU}
            under_p[k].add(tiles.E_PU)
    grads = {k for k in wanted if active & own[k]}
    prob = any(active & under_p[k] for k in grads)
    prob_u = tiles.LSE_U in active and any(tiles.LSE_U in own[k] for k in grads)
    planes = {P} if prob else set()
    if P in grads:
        planes |= {k for k, field in ((Q, tiles.E_Q), (R, tiles.E_PR)) if field in active}
    if prob_u or (P in grads and tiles.E_PU in active):
        planes |= u_planes(problem.mix)
    for k in grads:
        source = problem.sources[k]
        assert source is not None
        if source.softcap is not None or (k != P and LSE[k] in active):
            planes.add(k)
    return Plan(grads, planes, prob, prob_u)


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
    planes, g = tile.planes, cot.g
    a, b = sweep.problem.mix
    n_rows, n_columns = scratch.prob.shape
    prob, prob_u = scratch.prob, sweep.buffer("prob_u", (n_rows, n_columns)) if plan.prob_u else None
    scale = (
        tiles.probabilities_into(prob, planes.p, cot.stats[tiles.LSE_P], sweep.whole)
        if plan.prob and planes.p is not None
        else None
    )
    scale_u = None
    if prob_u is not None and planes.u is not None:
        scale_u = tiles.probabilities_into(prob_u, planes.u, cot.stats[tiles.LSE_U], sweep.whole)
    for k in sorted(plan.grads):
        if k == P:
            if scale is not None and cot.active & {tiles.LSE_P, *tiles.EXPECTATIONS}:
                dz = tiles.policy_gradient(planes, cot, prob, scale, scratch)
            else:
                dz = scratch.work.zero_()
        else:
            share = b if k == Q else a
            under_p = (g[tiles.E_Q] if k == Q else -g[tiles.E_PR]) - share * g[tiles.E_PU]
            terms: list[tuple[Tensor, Tensor]] = []
            if scale is not None and bool(under_p.any()):
                terms.append((prob, under_p * scale))
            if prob_u is not None and scale_u is not None and share != 0:
                terms.append((prob_u, share * g[tiles.LSE_U] * scale_u))
            z = planes[k]
            if LSE[k] in cot.active and z is not None:
                own = tiles.probabilities_into(scratch.terms, z, cot.stats[LSE[k]], sweep.whole)
                terms.append((scratch.terms, g[LSE[k]] * own))
            dz = tiles.weighted_sum(scratch.work, terms)
        if AT[k] in cot.active and tile.tokens is not None:
            tiles.add_at_tokens(dz, g[AT[k]], tile.tokens, sweep.whole)
        yield k, dz


def _held_rows(kept: dict[int, Tensor], real: Tensor, index: Tensor | None) -> Kept:
    """`kept`, which a forward over the rows `real` filled, as a backward over the rows `index` reads it."""
    held = real.nonzero()[:, 0]
    if index is None or index.shape == held.shape:
        return Kept(kept, held.shape[0], None)
    return Kept(kept, held.shape[0], torch.searchsorted(held, index))


def _zero_unswept(problem: Problem, untouched: set[int], touched: set[int], active_rows: Tensor) -> None:
    """Zeros what a backward in place leaves of the logits: whole streams without a gradient, and dead rows."""
    dead = (~active_rows).nonzero()[:, 0]
    for k, source in enumerate(problem.sources):
        if source is not None and k in untouched:
            source.hidden.zero_()
        elif source is not None and k in touched:
            source.hidden.index_fill_(0, dead, 0.0)
