"""Device functions that all sweeps share: the logits of one tile, in registers, as float32.

Beside its numbers (`Part`) a stream has two matrices: hidden [N, D] and weight [V, D], or logits [N, V] and
None; pointers, or tensor descriptors where MAPS. A stream that is not read is None throughout; ask its
matrix, not its tuple, whether it is (Triton 3.6 compares no tuple that holds a None).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# How the streams share heads; a head that is shared is read once.
OWN_HEADS, SHARED_PQ, SHARED_PR, SHARED_QR, SHARED_PQR = (tl.constexpr(k) for k in range(5))

BLOCK_RANK = tl.constexpr(16)


class Part(NamedTuple):
    """A stream but for its two matrices.

    bias [V]; low [N, n_rank] float32, scale·h·Aᵀ, and low_b [V, n_rank]; row strides of the matrices; n_d
    the hidden size; slope 1/temperature; cap the softcap. None for what is not there.
    """

    bias: Any
    low: Any
    low_b: Any
    stride_h: Any
    stride_w: Any
    n_d: Any
    n_rank: Any
    slope: Any
    cap: Any


class Shape(NamedTuple):
    """N, the end of the vocabulary, and the coefficients of u = mix_r·z_r + mix_q·z_q (None for 0)."""

    n_rows: Any
    n_vocab: Any
    mix_r: Any
    mix_q: Any


class Operands(NamedTuple):
    """A stream inside a kernel. n_d: the hidden entries to sum over, 0 where no row of the tile counts."""

    h: Any
    w: Any
    part: Any
    n_d: Any


class Config(NamedTuple):
    """The constants of a kernel: tile sizes, tensor descriptors or pointers, interpreter or GPU.

    Made in the call that takes it: an assignment would turn its constants into values.
    """

    n: Any
    v: Any
    d: Any
    maps: Any
    interpret: Any


@triton.jit
def place(n_blocks, n_others, GROUP: tl.constexpr):
    """(token block, other index) of this program: GROUP token blocks run through all others together."""
    pid = tl.program_id(0)
    width = GROUP * n_others
    first = (pid // width) * GROUP
    size = tl.minimum(n_blocks - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def load_block(
    x, row, column, stride, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAPS: tl.constexpr
):
    """x[row : row + ROWS, column : column + COLUMNS]: 0 beyond the columns, the last row beyond the rows."""
    if MAPS:
        return x.load([row, column])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), n_rows - 1).to(tl.int64)
        columns = column + tl.arange(0, COLUMNS)
        at = rows[:, None] * stride + columns[None, :]
        return tl.load(x + at, mask=columns[None, :] < n_columns, other=0.0)


@triton.jit
def dot(a, b, z, INTERPRET: tl.constexpr):
    """z + a·bᵀ, summed in float32. The interpreter gets float32 operands: its product of bf16 is wrong."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), z, input_precision="ieee")


@triton.jit
def rounded(x, pointer, INTERPRET: tl.constexpr):
    """float32 as the dtype that `pointer` points to."""
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts float32 off to bf16, where a GPU rounds to the nearest.
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def hidden_block(x, shape, row, d, cfg):
    return load_block(x.h, row, d, x.part.stride_h, shape.n_rows, x.part.n_d, cfg.n, cfg.d, cfg.maps)


@triton.jit
def products(x, y, z, shape, row, column, cfg, COUNT: tl.constexpr):
    """The products of the first COUNT of three streams with the head of x, in one pass over that head."""
    sum_x = tl.zeros([cfg.n, cfg.v], tl.float32)
    sum_y = sum_x
    sum_z = sum_x
    for d in range(0, x.n_d, cfg.d):
        w = load_block(x.w, column, d, x.part.stride_w, shape.n_vocab, x.part.n_d, cfg.v, cfg.d, cfg.maps)
        sum_x = dot(hidden_block(x, shape, row, d, cfg), w, sum_x, cfg.interpret)
        if COUNT > 1:
            sum_y = dot(hidden_block(y, shape, row, d, cfg), w, sum_y, cfg.interpret)
        if COUNT > 2:
            sum_z = dot(hidden_block(z, shape, row, d, cfg), w, sum_z, cfg.interpret)
    return sum_x, sum_y, sum_z


@triton.jit
def tanh(x):
    """tanh to the rounding of float32: a series around 0, where 1 − exp(−2x) would cancel."""
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0)
    series = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def finish(z, part, shape, row, column, cfg):
    """Logits from products: low-rank term, bias, softcap, temperature; −inf beyond the vocabulary."""
    columns = column + tl.arange(0, cfg.v)
    if part.low is not None:
        n_rank = part.n_rank
        for k in range(0, n_rank, BLOCK_RANK):
            low = load_block(part.low, row, k, n_rank, shape.n_rows, n_rank, cfg.n, BLOCK_RANK, False)
            b = load_block(part.low_b, column, k, n_rank, shape.n_vocab, n_rank, cfg.v, BLOCK_RANK, False)
            z = tl.dot(low, tl.trans(b.to(tl.float32)), z, input_precision="tf32x3")
    if part.bias is not None:
        z += tl.load(part.bias + columns, mask=columns < shape.n_vocab, other=0.0).to(tl.float32)[None, :]
    if part.cap is not None:
        z = part.cap * tanh(z / part.cap)
    return without_tail(z * part.slope, shape, column, cfg)


@triton.jit
def without_tail(z, shape, column, cfg):
    """−inf beyond the vocabulary."""
    columns = column + tl.arange(0, cfg.v)
    return tl.where((columns < shape.n_vocab)[None, :], z, float("-inf"))


@triton.jit
def stream_tile(x, shape, row, column, cfg):
    """The logits of one stream that shares no head; zeros where there is no stream."""
    if x.h is None:
        return tl.zeros([cfg.n, cfg.v], tl.float32)
    elif x.w is None:
        z = load_block(x.h, row, column, x.part.stride_h, shape.n_rows, shape.n_vocab, cfg.n, cfg.v, False)
        return finish(z.to(tl.float32), x.part, shape, row, column, cfg)
    else:
        z, _, _ = products(x, x, x, shape, row, column, cfg, 1)
        return finish(z, x.part, shape, row, column, cfg)


@triton.jit
def pair_tile(x, y, shape, row, column, cfg):
    """The logits of two streams with one head."""
    z_x, z_y, _ = products(x, y, x, shape, row, column, cfg, 2)
    z_x = finish(z_x, x.part, shape, row, column, cfg)
    return z_x, finish(z_y, y.part, shape, row, column, cfg)


@triton.jit
def logits_tile(p, q, r, shape, row, column, cfg, SHARE: tl.constexpr, WITH_U: tl.constexpr):
    """(z_p, z_q, z_r, u) of one tile. Where it can, z_p comes last, when what u is mixed of may be gone."""
    if SHARE == SHARED_PQR:
        z_p, z_q, z_r = products(p, q, r, shape, row, column, cfg, 3)
        z_p = finish(z_p, p.part, shape, row, column, cfg)
        z_q = finish(z_q, q.part, shape, row, column, cfg)
        z_r = finish(z_r, r.part, shape, row, column, cfg)
        u = mixed(z_q, z_r, shape, column, cfg, WITH_U)
    elif SHARE == SHARED_PQ:
        z_r = stream_tile(r, shape, row, column, cfg)
        z_p, z_q = pair_tile(p, q, shape, row, column, cfg)
        u = mixed(z_q, z_r, shape, column, cfg, WITH_U)
    elif SHARE == SHARED_PR:
        z_q = stream_tile(q, shape, row, column, cfg)
        z_p, z_r = pair_tile(p, r, shape, row, column, cfg)
        u = mixed(z_q, z_r, shape, column, cfg, WITH_U)
    elif SHARE == SHARED_QR:
        z_q, z_r = pair_tile(q, r, shape, row, column, cfg)
        u = mixed(z_q, z_r, shape, column, cfg, WITH_U)
        z_p = stream_tile(p, shape, row, column, cfg)
    else:
        z_q = stream_tile(q, shape, row, column, cfg)
        z_r = stream_tile(r, shape, row, column, cfg)
        u = mixed(z_q, z_r, shape, column, cfg, WITH_U)
        z_p = stream_tile(p, shape, row, column, cfg)
    return z_p, z_q, z_r, u


@triton.jit
def mixed(z_q, z_r, shape, column, cfg, WITH_U: tl.constexpr):
    """u = mix_r·z_r + mix_q·z_q; a coefficient of 0 drops its stream, infinities included."""
    if not WITH_U:
        return z_q
    elif shape.mix_r is None:
        return without_tail(shape.mix_q * z_q, shape, column, cfg)
    elif shape.mix_q is None:
        return without_tail(shape.mix_r * z_r, shape, column, cfg)
    else:
        return without_tail(shape.mix_r * z_r + shape.mix_q * z_q, shape, column, cfg)
