"""From a problem to kernel launches: which kernel, which tiles, which arguments.

Nothing here needs a device: a launch of meta tensors can be compiled for any chip. Imports triton, so it is
itself imported at first use only.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from etpo.kernels.plan import E_PP, E_PR, E_PU, E_Q, LSE, P, Plan, Q, R, U, forward_planes
from etpo.kernels.streams import Problem, Source, VocabStats
from etpo.kernels.triton import sizes as config
from etpo.kernels.triton.backward import Derivative, gradient_kernel
from etpo.kernels.triton.forward import Partial, merge_kernel, sweep_kernel
from etpo.kernels.triton.tile import OWN_HEADS, SHARED_PQ, SHARED_PQR, SHARED_PR, SHARED_QR, Part, Shape

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# The tiles of Hopper and Blackwell take the shared memory of a data-centre chip, in bytes.
LARGE_SHARED = 200 * 1024

NAMES = VocabStats._fields


class Target(NamedTuple):
    """What a launch has to know of a chip: its key in config.TILES, and its number of multiprocessors."""

    chip: str
    n_processors: int


def target_of(tensor: Tensor) -> Target:
    """The chip that `tensor` is on; in the interpreter a made-up one."""
    if not tensor.is_cuda:
        return Target(config.CHIP_INTERPRETED, 1)
    properties = torch.cuda.get_device_properties(tensor.device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)
    return Target(chip_of(properties.major, shared_bytes), properties.multi_processor_count)


def chip_of(major: int, shared_bytes: int) -> str:
    """The key in config.TILES of a chip of compute capability `major`."""
    if major < 9 or shared_bytes < LARGE_SHARED:
        return "pointers"
    return "hopper" if major == 9 else "blackwell"


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def run(launches: list[Launch], tensor: Tensor) -> None:
    """Runs the launches on the device of `tensor`."""
    with device_of(tensor):
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.options)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context in which a kernel for `tensor` is launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Inputs(NamedTuple):
    """A problem as the kernels take it: six matrices, three parts, and the constants of both."""

    matrices: tuple[Any, ...]
    parts: tuple[Part | None, ...]
    tile: config.Tile
    constants: dict[str, Any]


def prepare(
    problem: Problem, kind: str, planes: set[int], own: set[int], numbers_of: set[int], target: Target
) -> Inputs:
    """The inputs of a "forward" or "backward" kernel that makes the logits of `planes`.

    own: the planes that it reads other than to mix u; numbers_of: further streams of which it reads the
    numbers alone.
    """
    logits = problem.first.weight is None
    # One float32 stream is enough to want the tiles of float32.
    float32 = any(source is not None and source.hidden.dtype == torch.float32 for source in problem.sources)
    share = share_of(problem, planes)
    matrices: list[Tensor | None] = []
    parts: list[Part | None] = []
    for k, source in enumerate(problem.sources):
        h = w = None
        if source is not None and k in planes:
            h = dense(source.hidden)
            w = None if source.weight is None else dense(source.weight)
        matrices += [h, w]
        read = source is not None and (k in planes or k in numbers_of)
        parts.append(part_of(source, h, w) if source is not None and read else None)
    operands: list[Any] = list(matrices)
    aligned = all(m is None or fits_maps(m) for m in matrices)
    chip = target.chip if aligned and not logits and not float32 else "pointers"
    maps = chip != "pointers"
    live = n_live(kind, planes, own, share)
    if any(part is not None and (part.low is not None or part.cap is not None) for part in parts):
        # A low-rank product or a tanh needs registers of its own,
        live = min(4, live + 1)
    if not aligned:
        # and a matrix that is read entry by entry more of them.
        live = min(4, live + 2)
    tile = config.sweep_tile(chip, live, float32=float32, logits=logits, interpreted=INTERPRET)
    if maps:
        for i, matrix in enumerate(matrices):
            if matrix is not None:
                block = [tile.block_n if i % 2 == 0 else tile.block_v, tile.block_d]
                operands[i] = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
    constants: dict[str, Any] = {
        "SHARE": share,
        "MAPS": maps,
        "INTERPRET": INTERPRET,
        "GROUP": config.GROUP_N,
    }
    sizes = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d}
    constants |= sizes | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    constants |= config.SWEEP_COMPILER
    return Inputs(tuple(operands), tuple(parts), tile, constants)


def share_of(problem: Problem, planes: set[int]) -> int:
    """Which of the streams in `planes` share their head."""
    p, q, r = (None if s is None or k not in planes else s.weight for k, s in enumerate(problem.sources))
    pq, pr, qr = p is not None and p is q, p is not None and p is r, q is not None and q is r
    if pq and pr:
        return int(SHARED_PQR.value)
    shares = ((pq, SHARED_PQ), (pr, SHARED_PR), (qr, SHARED_QR))
    return int(next((share for same, share in shares if same), OWN_HEADS).value)


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
        pieces = [h_rows.float() @ a.float().T for h_rows in source.hidden.split(config.DZ_ROWS)]
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
    return Shape(problem.first.hidden.shape[0], stop, a or None, b or None)


def named(by_index: dict[int, Tensor]) -> VocabStats:
    return VocabStats(**{name: by_index.get(k) for k, name in enumerate(NAMES)})


def forward_launches(problem: Problem, outs: dict[int, Tensor], target: Target) -> list[Launch]:
    """The sweep and the merge that write the statistics `outs`, by index, [N ≥ 1] float64 each."""
    hidden, n_vocab = problem.first.hidden, problem.first.n_vocab
    n_rows = hidden.shape[0]
    planes = forward_planes(set(outs), problem.mix)
    own = forward_planes(set(outs), (0.0, 0.0)) - {U}
    inputs = prepare(problem, "forward", planes, own, set(), target)
    n_blocks, n_columns = triton.cdiv(n_rows, inputs.tile.block_n), triton.cdiv(n_vocab, inputs.tile.block_v)
    n_splits = min(n_columns, triton.cdiv(config.WAVES * target.n_processors, n_blocks))
    n_steps = triton.cdiv(n_columns, n_splits)
    n_splits = triton.cdiv(n_columns, n_steps)
    slots = slots_of(set(outs))
    space = torch.empty(len(slots), n_splits, n_rows, dtype=torch.float32, device=hidden.device)
    partial = Partial(**dict(zip(slots, space, strict=True)))
    sweep_args = (*inputs.matrices, *inputs.parts, problem.targets, partial, shape_of(problem, n_vocab),
                  n_splits, n_steps, problem.ignore_index)  # fmt: skip
    merge_args = (partial, problem.targets, named(outs), n_rows, n_splits, problem.ignore_index)
    merge_options = config.COMPILER | {"BLOCK": config.MERGE_ROWS, "num_warps": 4}
    return [
        Launch(sweep_kernel, (n_blocks * n_splits,), sweep_args, inputs.constants),
        Launch(merge_kernel, (triton.cdiv(n_rows, config.MERGE_ROWS),), merge_args, merge_options),
    ]


def slots_of(fields: set[int]) -> list[str]:
    """The partial numbers that the statistics `fields` are merged from."""
    slots = set()
    sums = {E_PR: ("s_pr", "r"), E_PU: ("s_pu", "u"), E_PP: ("s_pp", "p"), E_Q: ("s_q", "q")}
    for k in fields:
        if k in sums:
            name, other = sums[k]
            slots |= {name, "m_p", "l_p", f"m_{other}"}
        elif k in LSE:
            slots |= {f"m_{NAMES[k][-1]}", f"l_{NAMES[k][-1]}"}
        else:
            slots.add(NAMES[k])
    return [name for name in Partial._fields if name in slots]


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
            source = problem.sources[k]
            capped = source is not None and source.softcap is not None
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
        return Launch(gradient_kernel, (n_blocks * n_columns,), args, self.flags | inputs.constants)
