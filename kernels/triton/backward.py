"""The sweep backward: one tile of logits made again, and its derivative from cotangents of statistics."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from etpo.kernels.gradients import Factors, Gradients, Plan, collect, plan_backward
from etpo.kernels.operators import Cotangents
from etpo.kernels.plan import E_PR, E_Q, LSE, P, Q, R, U
from etpo.kernels.streams import Problem, Source
from etpo.kernels.triton import sizes
from etpo.kernels.triton.tile import (
    Config,
    Launch,
    Operands,
    Target,
    logits_tile,
    named,
    place,
    prepare,
    rounded,
    run,
    shape_of,
    target_of,
)


class Derivative(NamedTuple):
    """Where the derivative by the logits of each stream goes, and the row strides; None where not wanted."""

    p: Any
    q: Any
    r: Any
    stride_p: Any
    stride_q: Any
    stride_r: Any


@triton.jit
def number(x, rows, inside):
    """A float64 number of each row; 0 where there is none."""
    if x is None:
        return tl.zeros(rows.shape, tl.float64)
    else:
        return tl.load(x + rows, mask=inside, other=0.0)


@triton.jit
def minus_rows(z, value):
    """z − value by row; value is float64 and may be large, so its rounding to float32 is taken off too."""
    high = value.to(tl.float32)
    low = (value - high.to(tl.float64)).to(tl.float32)
    return (z - high[:, None]) - low[:, None]


@triton.jit
def softmax(z, lse, rows, inside):
    return tl.exp(minus_rows(z, number(lse, rows, inside)))


@triton.jit
def scaled(x, g):
    """x · g by row; 0 where g is 0, whatever x."""
    g = g.to(tl.float32)[:, None]
    return tl.where(g == 0.0, 0.0, x * g)


@triton.jit
def any_cotangent(x, rows, inside):
    return number(x, rows, inside) != 0.0


@triton.jit
def chained(dz, z, part):
    """The derivative by what softcap and temperature are applied to."""
    if part.cap is not None:
        ratio = z / (part.cap * part.slope)
        dz = tl.where(z == float("-inf"), 0.0, dz * (1.0 - ratio * ratio))
    return dz * part.slope


@triton.jit
def write_tile(x, stride, dz, live, rows, columns, mask, INTERPRET: tl.constexpr):
    """Stores dz at rows and columns counted from the start of x; rows that do not count get 0."""
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(x + at, rounded(tl.where(live[:, None], dz, 0.0), x, INTERPRET), mask=mask)


@triton.jit
def gradient_kernel(
    h_p, w_p, h_q, w_q, h_r, w_r, p, q, r, targets, stats, g, out, shape, row_start, row_stop, column_start,
    ignore_index, PROB: tl.constexpr, PROB_U: tl.constexpr, WITH_U: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    MAPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The derivative by the logits of rows [row_start, row_stop) and columns [column_start, shape.n_vocab).

    stats and g are VocabStats of pointers: the statistics, and their cotangents.
    """
    n_columns = shape.n_vocab - column_start
    n_blocks = tl.cdiv(row_stop - row_start, BLOCK_N)
    block, step = place(n_blocks, tl.cdiv(n_columns, BLOCK_V), GROUP)
    row = row_start + block * BLOCK_N
    column = column_start + step * BLOCK_V
    rows = row + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_V)
    inside = rows < row_stop
    live = any_cotangent(g.lse_p, rows, inside) | any_cotangent(g.lse_q, rows, inside)
    live |= any_cotangent(g.lse_r, rows, inside) | any_cotangent(g.lse_u, rows, inside)
    live |= any_cotangent(g.e_pr, rows, inside) | any_cotangent(g.e_pu, rows, inside)
    live |= any_cotangent(g.e_pp, rows, inside) | any_cotangent(g.e_q, rows, inside)
    live |= any_cotangent(g.at_p, rows, inside) | any_cotangent(g.at_q, rows, inside)
    live |= any_cotangent(g.at_r, rows, inside)
    if targets is not None:
        tokens = tl.load(targets + rows, mask=inside, other=ignore_index)
        live &= tokens != ignore_index
        hit = columns[None, :] == tokens[:, None]
    # A block of rows without a cotangent has nothing to multiply.
    some = tl.max(live.to(tl.int32), 0)
    stream_p = Operands(h_p, w_p, p, p.n_d * some if h_p is not None else 0)
    stream_q = Operands(h_q, w_q, q, q.n_d * some if h_q is not None else 0)
    stream_r = Operands(h_r, w_r, r, r.n_d * some if h_r is not None else 0)
    z_p, z_q, z_r, u = logits_tile(
        stream_p, stream_q, stream_r, shape, row, column,
        Config(BLOCK_N, BLOCK_V, BLOCK_D, MAPS, INTERPRET), SHARE, WITH_U,
    )  # fmt: skip

    g_pr, g_pu = number(g.e_pr, rows, inside), number(g.e_pu, rows, inside)
    g_q, g_lse_u = number(g.e_q, rows, inside), number(g.lse_u, rows, inside)
    row_at, column_at = rows - row_start, columns - column_start
    mask = inside[:, None] & (columns < shape.n_vocab)[None, :]
    if PROB:
        prob = softmax(z_p, stats.lse_p, rows, inside)
    if PROB_U:
        prob_u = softmax(u, stats.lse_u, rows, inside)

    if out.p is not None:
        dz = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if PROB:
            dz += (number(g.lse_p, rows, inside) + g_pr + g_pu).to(tl.float32)[:, None]
            if g.e_pr is not None:
                dz += scaled(minus_rows(z_p - z_r, number(stats.e_pr, rows, inside)), g_pr)
            if g.e_pu is not None:
                dz += scaled(minus_rows(z_p - u, number(stats.e_pu, rows, inside)), g_pu)
            if g.e_pp is not None:
                mean = number(stats.e_pp, rows, inside) + number(stats.lse_p, rows, inside)
                dz += scaled(minus_rows(z_p, mean), number(g.e_pp, rows, inside))
            if g.e_q is not None:
                dz += scaled(minus_rows(z_q, number(stats.e_q, rows, inside)), g_q)
            dz = tl.where(prob == 0.0, 0.0, prob * dz)
        if g.at_p is not None:
            dz += tl.where(hit, number(g.at_p, rows, inside).to(tl.float32)[:, None], 0.0)
        write_tile(out.p, out.stride_p, chained(dz, z_p, p), live, row_at, column_at, mask, INTERPRET)
    if out.q is not None:
        dz = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if PROB:
            under_p = g_q
            if shape.mix_q is not None:
                under_p -= shape.mix_q * g_pu
            dz += scaled(prob, under_p)
        if PROB_U and shape.mix_q is not None:
            dz += scaled(prob_u, shape.mix_q * g_lse_u)
        if g.lse_q is not None:
            dz += scaled(softmax(z_q, stats.lse_q, rows, inside), number(g.lse_q, rows, inside))
        if g.at_q is not None:
            dz += tl.where(hit, number(g.at_q, rows, inside).to(tl.float32)[:, None], 0.0)
        write_tile(out.q, out.stride_q, chained(dz, z_q, q), live, row_at, column_at, mask, INTERPRET)
    if out.r is not None:
        dz = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if PROB:
            under_p = -g_pr
            if shape.mix_r is not None:
                under_p -= shape.mix_r * g_pu
            dz += scaled(prob, under_p)
        if PROB_U and shape.mix_r is not None:
            dz += scaled(prob_u, shape.mix_r * g_lse_u)
        if g.lse_r is not None:
            dz += scaled(softmax(z_r, stats.lse_r, rows, inside), number(g.lse_r, rows, inside))
        if g.at_r is not None:
            dz += tl.where(hit, number(g.at_r, rows, inside).to(tl.float32)[:, None], 0.0)
        write_tile(out.r, out.stride_r, chained(dz, z_r, r), live, row_at, column_at, mask, INTERPRET)


class Backward:
    """The gradient kernel of one problem, from cotangents g and statistics by index, [N] float64 each."""

    def __init__(
        self, problem: Problem, g: dict[int, Tensor], stats: dict[int, Tensor], plan: Plan, target: Target
    ) -> None:
        self.problem = problem
        self.grads = plan.grads
        self.g, self.stats = named(g), named(stats)
        self.flags = {"PROB": plan.prob, "PROB_U": plan.prob_u, "WITH_U": U in plan.planes}
        own = plan.planes & {P}
        for k, field in ((Q, E_Q), (R, E_PR)):
            capped = k in problem.streams and problem.streams[k].softcap is not None
            if (P in plan.grads and field in g) or (k in plan.grads and (LSE[k] in g or capped)):
                own |= {k}
        self.inputs = prepare(problem, "backward", plan.planes, own & plan.planes, plan.grads, target)

    def launch(self, dz: dict[int, Tensor], rows: slice, columns: slice) -> Launch:
        """Writes to dz, by stream, the derivative by the logits of `rows` and `columns`."""
        inputs, tile = self.inputs, self.inputs.tile
        strides = (dz[k].stride(0) if k in dz else 0 for k in (P, Q, R))
        out = Derivative(*(dz.get(k) for k in (P, Q, R)), *strides)
        n_blocks = triton.cdiv(rows.stop - rows.start, tile.block_n)
        n_columns = triton.cdiv(columns.stop - columns.start, tile.block_v)
        args = (*inputs.matrices, *inputs.parts, self.problem.targets, self.stats, self.g, out,
                shape_of(self.problem, columns.stop), rows.start, rows.stop, columns.start,
                self.problem.ignore_index)  # fmt: skip
        return Launch(
            gradient_kernel, (n_blocks * n_columns,), args, self.flags | inputs.constants, True, inputs.name
        )


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


def pieces_of(problem: Problem, entry_bytes: int, tile: sizes.Tile, *, heads: bool) -> Pieces:
    """Whole rows where no head is trained, so that ∂/∂hidden is one product; else few vocabulary blocks.

    entry_bytes: of the derivatives at one token and one vocabulary entry.
    """
    n_rows, n_vocab = problem.n_rows, problem.n_vocab
    elements = sizes.DZ_BYTES // entry_bytes
    if not heads:
        rows = max(tile.block_n, elements // n_vocab // tile.block_n * tile.block_n)
        return Pieces(n_rows, n_vocab, min(n_rows, rows), n_vocab)
    rows = min(n_rows, sizes.DZ_ROWS)
    columns = max(tile.block_v, elements // rows // tile.block_v * tile.block_v)
    return Pieces(n_rows, n_vocab, rows, min(n_vocab, columns))


def dz_dtype(sources: Iterable[Source]) -> torch.dtype:
    """bf16 has the range of float32, so bf16 matrices get it; float16 would lose what is small.

    A float32 matrix beside them keeps its precision; `multiply` rounds what meets a bf16 matrix.
    """
    matrices = [m for source in sources for m in (source.hidden, source.weight) if m is not None]
    return torch.bfloat16 if {m.dtype for m in matrices} == {torch.bfloat16} else torch.float32


def backward(problem: Problem, fields: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for, from the statistics `fields` that `forward` returned."""
    g = {fields[k]: x.contiguous() for k, x in cotangents.g.items()}
    stats = dict(zip(fields, cotangents.made, strict=True))
    sink = Gradients(cotangents.wanted, torch.float32)
    plan = plan_backward(problem, set(g), sink.streams_of(problem))
    kernel = Backward(problem, g, stats, plan, target_of(problem.device))
    if problem.given_logits:
        return _logits_backward(kernel, cotangents)
    if not plan.grads or problem.n_rows == 0:
        return sink.results()
    sources = {k: source for k, source in problem.streams.items() if k in plan.grads}
    heads = sink.heads_ask(sources.values())
    live = live_rows(problem, g) if heads else None
    dtype = dz_dtype(sources.values())
    pieces = pieces_of(problem, len(sources) * dtype.itemsize, kernel.inputs.tile, heads=heads)
    sink.whole_rows = pieces.block == pieces.n_vocab
    # Rows of a multiple of 128 bytes keep the matrix products on their fast path.
    shape = (len(sources), pieces.chunk, triton.cdiv(pieces.block, 64) * 64)
    space = torch.empty(shape, dtype=dtype, device=problem.device)
    for columns in pieces.blocks():
        for rows in pieces.chunks():
            n, m = rows.stop - rows.start, columns.stop - columns.start
            dz = {k: space[i, :n, :m] for i, k in enumerate(sources)}
            run([kernel.launch(dz, rows, columns)], problem.device)
            for k, tile in dz.items():
                sink.add(sources[k], tile, rows, columns, factors_of(sources[k], sink, rows, columns, live))
            sink.close_rows()
        sink.close_blocks()
    return sink.results()


def factors_of(source: Source, sink: Gradients, rows: slice, columns: slice, live: Tensor | None) -> Factors:
    """What the derivative by the products of `rows` and `columns` is multiplied with.

    live: the rows that count, [N]: not even a NaN of the others may reach a head. None if no head asks.
    """
    assert source.weight is not None
    hidden = source.hidden[rows]
    if live is not None:
        hidden = hidden.masked_fill(~live[rows, None], 0.0)
    if source.weight.dtype == torch.float32:
        # A float32 head beside bf16 hidden states gets a gradient of float32.
        hidden = hidden.float()
    factors = Factors(hidden, source.weight[columns])
    if source.lora is None:
        return factors
    a, b, _ = source.lora
    low = hidden.float() @ a.float().T if sink.ask(b) else None
    return factors._replace(low=low, a=a, b=b[columns])


def live_rows(problem: Problem, g: dict[int, Tensor]) -> Tensor:
    """True for the tokens that count and have a cotangent, [N]."""
    live = torch.stack(list(g.values())).ne(0).any(0)
    return live if problem.targets is None else live & (problem.targets != problem.ignore_index)


def _logits_backward(kernel: Backward, cotangents: Cotangents) -> list[Tensor]:
    """The gradients of given logits: the kernel writes them, and the matrix products fall away."""
    problem, wanted = kernel.problem, cotangents.wanted
    outs = {id(z): z if cotangents.in_place else torch.empty(z.shape, dtype=z.dtype, device=z.device)
            for z in wanted}  # fmt: skip
    uses = [id(source.hidden) for source in problem.streams.values()]
    dz: dict[int, Tensor] = {}
    sums: list[tuple[int, Tensor]] = []
    for k in sorted(kernel.grads):
        logits = problem.streams[k].hidden
        out = outs[id(logits)]
        if uses.count(id(logits)) > 1 or out.stride(1) != 1:
            # The kernel stores rows whose columns lie next to each other, and each stream on its own.
            out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            sums.append((id(logits), out))
        dz[k] = out
    if dz and problem.n_rows:
        run([kernel.launch(dz, slice(0, problem.n_rows), slice(0, problem.n_vocab))], problem.device)
    written = {id(out) for out in dz.values()}
    for logits, total in zip(wanted, collect(wanted, sums), strict=True):
        if id(outs[id(logits)]) not in written:
            outs[id(logits)].copy_(total)
    if not cotangents.in_place:
        return list(outs.values())
    # A kernel writes unseen by autograd, which has to refuse whoever still needs these logits.
    for logits in wanted:
        torch.autograd.graph.increment_version(logits)
    return []
