"""The sweep backward: one tile of logits made again, and its derivative from cotangents of statistics."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from etpo.kernels.triton.tile import Config, Operands, logits_tile, place, rounded


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
def less(z, value):
    """z − value by row; value is float64 and may be large, so its rounding to float32 is taken off too."""
    high = value.to(tl.float32)
    low = (value - high.to(tl.float64)).to(tl.float32)
    return (z - high[:, None]) - low[:, None]


@triton.jit
def softmax(z, lse, rows, inside):
    return tl.exp(less(z, number(lse, rows, inside)))


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
        dz = dz * (1.0 - ratio * ratio)
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
                dz += scaled(less(z_p - z_r, number(stats.e_pr, rows, inside)), g_pr)
            if g.e_pu is not None:
                dz += scaled(less(z_p - u, number(stats.e_pu, rows, inside)), g_pu)
            if g.e_pp is not None:
                mean = number(stats.e_pp, rows, inside) + number(stats.lse_p, rows, inside)
                dz += scaled(less(z_p, mean), number(g.e_pp, rows, inside))
            if g.e_q is not None:
                dz += scaled(less(z_q, number(stats.e_q, rows, inside)), g_q)
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
