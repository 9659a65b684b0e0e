"""What all sweeps share: the logits of one tile, in registers, as float32; and what a launch of it takes.

Beside its numbers (`Part`) a stream has two matrices: hidden [N, D] and weight [V, D], or logits [N, V] and
None; pointers, or tensor descriptors where MAPS. A stream that is not read is None throughout; ask its
matrix, not its tuple, whether it is (Triton 3.6 compares no tuple that holds a None).
"""

import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from etpo.kernels.checks import memory_of
from etpo.kernels.plan import NAMES, P, Q, R, U
from etpo.kernels.streams import Problem, Source, VocabStats
from etpo.kernels.triton import sizes
from etpo.kernels.triton.measured import measured_on

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# The tiles of Hopper and Blackwell take the shared memory of a data-centre chip, in bytes.
LARGE_SHARED = 200 * 1024

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
    """z + a·bᵀ, summed in float32. A float32 head beside bf16 hidden states is read as it is.

    The interpreter gets float32 operands: its product of bf16 is wrong.
    """
    if INTERPRET or a.dtype != b.dtype:
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
        # What is masked stays so.
        z = tl.where(z == float("-inf"), z, part.cap * tanh(z / part.cap))
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


class Target(NamedTuple):
    """What a launch has to know of a chip: its key in sizes.TILES, multiprocessors, measured tiles."""

    chip: str
    n_processors: int
    tiles: dict[str, sizes.Tile] = {}  # noqa: RUF012 - never written to


def target_of(device: torch.device) -> Target:
    """The chip of `device`; in the interpreter a made-up one."""
    if device.type != "cuda":
        return Target(sizes.CHIP_INTERPRETED, 1)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)
    chip = chip_of(properties.major, shared_bytes)
    return Target(chip, properties.multi_processor_count, measured_on(device).tiles)


def chip_of(major: int, shared_bytes: int) -> str:
    """The key in sizes.TILES of a chip of compute capability `major`."""
    if major < 9 or shared_bytes < LARGE_SHARED:
        return "pointers"
    return "hopper" if major == 9 else "blackwell"


class Launch(NamedTuple):
    """One call of a kernel. constants: its own and the compiler's; is_sweep: it may take every register.

    name: of a sweep its `kernel_name`.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    is_sweep: bool = False
    name: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The constants, and what only the compiler of the chip that Triton now compiles for knows."""
        nvidia = self.is_sweep and not INTERPRET and driver.active.get_current_target().backend == "cuda"
        return self.constants | sizes.NVIDIA_SWEEP if nvidia else self.constants


def run(launches: list[Launch], device: torch.device) -> None:
    """Runs the launches on `device`."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.options)


class Inputs(NamedTuple):
    """A problem as the kernels take it: six matrices, three parts, and the constants of both."""

    matrices: tuple[Any, ...]
    parts: tuple[Part | None, ...]
    tile: sizes.Tile
    name: str
    constants: dict[str, Any]


def prepare(
    problem: Problem, kind: str, planes: set[int], own: set[int], numbers_of: set[int], target: Target
) -> Inputs:
    """The inputs of a "forward" or "backward" kernel that makes the logits of `planes`.

    own: the planes that it reads other than to mix u; numbers_of: further streams of which it reads the
    numbers alone.
    """
    # One float32 matrix is enough to want the tiles of float32.
    matrices = [m for s in problem.streams.values() for m in (s.hidden, s.weight) if m is not None]
    float32 = any(matrix.dtype == torch.float32 for matrix in matrices)
    share = share_of(problem, planes)
    operands: list[Any] = [None] * 6
    parts: list[Part | None] = [None] * 3
    for k, source in problem.streams.items():
        h = w = None
        if k in planes:
            h = dense(source.hidden)
            w = None if source.weight is None else dense(source.weight)
            operands[2 * k : 2 * k + 2] = h, w
        if k in planes or k in numbers_of:
            parts[k] = part_of(source, h, w)
    aligned = all(m is None or fits_maps(m) for m in operands)
    chip = target.chip if aligned and not problem.given_logits and not float32 else "pointers"
    maps = chip != "pointers"
    rich = any(part is not None and (part.low is not None or part.cap is not None) for part in parts)
    name = kernel_name(kind, planes, own, share, rich=rich, aligned=aligned)
    if INTERPRET:
        tile = sizes.INTERPRETED
    elif problem.given_logits:
        tile = sizes.LOGITS
    elif float32:
        tile = sizes.FLOAT32
    else:
        live = n_live(kind, planes, own, share)
        # A low-rank product or a tanh needs registers of its own, a matrix read entry by entry more of them.
        live = min(4, live + rich + 2 * (not aligned))
        tile = target.tiles.get(name) or sizes.BY_KERNEL[chip].get(name) or sizes.TILES[chip][live]
    if maps:
        for i, matrix in enumerate(operands):
            if matrix is not None:
                block = [tile.block_n if i % 2 == 0 else tile.block_v, tile.block_d]
                operands[i] = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
    constants: dict[str, Any] = {
        "SHARE": share,
        "MAPS": maps,
        "INTERPRET": INTERPRET,
        "GROUP": sizes.GROUP_N,
    }
    constants |= {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d}
    constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | sizes.COMPILER
    return Inputs(tuple(operands), tuple(parts), tile, name, constants)


def share_of(problem: Problem, planes: set[int]) -> int:
    """Which of the streams in `planes` share their head."""
    weights = [problem.streams[k].weight if k in planes else None for k in (P, Q, R)]
    p, q, r = (None if weight is None else memory_of(weight) for weight in weights)
    pq, pr, qr = p is not None and p == q, p is not None and p == r, q is not None and q == r
    if pq and pr:
        return int(SHARED_PQR.value)
    shares = ((pq, SHARED_PQ), (pr, SHARED_PR), (qr, SHARED_QR))
    return int(next((share for same, share in shares if same), OWN_HEADS).value)


def kernel_name(kind: str, planes: set[int], own: set[int], share: int, *, rich: bool, aligned: bool) -> str:
    """What a kernel is called in a table of tiles, as "forward p u, of q r, q = r".

    Its planes, those that it reads only to mix u, and its shared heads; "rich" where a stream has a low-rank
    term or a softcap, "unaligned" where a matrix is read entry by entry.
    """
    mixed = planes - own - {U}
    parts = [
        " ".join([kind, *("pqru"[k] for k in sorted(planes - mixed))]),
        " ".join(["of", *("pqr"[k] for k in sorted(mixed))]) if mixed else "",
        ["", "p = q", "p = r", "q = r", "p = q = r"][share],
        "rich" if rich else "",
        "" if aligned else "unaligned",
    ]
    return ", ".join(filter(None, parts))


def n_live(kind: str, planes: set[int], own: set[int], share: int) -> int:
    """Float32 tiles that a kernel holds at once, 1 to 4."""
    # A head shared with the policy is read with the policy, so u is not mixed before.
    late = share in (SHARED_PQ.value, SHARED_PR.value, SHARED_PQR.value)
    together = planes - {U} if late else planes & {Q, R}
    # Backward then needs registers for a derivative beside those tiles.
    n_together = len(together) + (late and kind == "backward")
    return max(1, min(4, max(len(own | (planes & {U})), n_together)))


def dense(matrix: Tensor) -> Tensor:
    """`matrix` with its columns next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def fits_maps(matrix: Tensor) -> bool:
    """True where a tensor descriptor can describe `matrix`."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and row_bytes > 0


def part_of(source: Source, h: Tensor | None, w: Tensor | None) -> Part:
    """The numbers of a stream; h and w are None where its logits are not made."""
    low = low_b = None
    if source.lora is not None and h is not None and source.lora[0].shape[0]:
        a, b, scale = source.lora
        # In pieces: a float32 copy of all hidden states would grow with the tokens.
        pieces = [h_rows.float() @ a.float().T for h_rows in torch.split(source.hidden, sizes.DZ_ROWS)]
        low = torch.cat(pieces).mul_(scale)
        low_b = b.contiguous()
    return Part(
        bias=None if source.bias is None else source.bias.contiguous(),
        low=low,
        low_b=low_b,
        stride_h=0 if h is None else h.stride(0),
        stride_w=0 if w is None else w.stride(0),
        n_d=0 if source.weight is None else source.weight.shape[1],
        n_rank=0 if low_b is None else low_b.shape[1],
        slope=1.0 / source.temperature,
        cap=source.softcap,
    )


def shape_of(problem: Problem, stop: int) -> Shape:
    """The numbers that all streams share, for columns below `stop`."""
    a, b = problem.mix
    return Shape(problem.n_rows, stop, a or None, b or None)


def named(by_index: dict[int, Tensor]) -> VocabStats:
    """Numbers by index as the kernels take them."""
    return VocabStats(**{name: by_index.get(k) for k, name in enumerate(NAMES)})
