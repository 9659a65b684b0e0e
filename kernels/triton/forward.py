"""The sweep forward: online statistics over one split of the vocabulary, and the merge of the splits.

A split keeps, by row and in float32, the running maximum m of each plane, l = Σ exp(z − m), and the sums
s = Σ exp(z_p − m_p)·contrast, where a contrast is taken between logits less their maxima: a level that rows
share costs no digits. The merge runs over the splits in order, in float64.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from etpo.kernels.gradients import planes_of
from etpo.kernels.plan import E_PP, E_PR, E_PU, E_Q, LSE, NAMES, READS, U
from etpo.kernels.streams import Problem
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
    run,
    shape_of,
    target_of,
)

MINUS_INF = tl.constexpr(float("-inf"))


class Partial(NamedTuple):
    """What the splits leave, [n_splits, N] float32 each; None for what no statistic needs."""

    m_p: Any = None
    l_p: Any = None
    m_q: Any = None
    l_q: Any = None
    m_r: Any = None
    l_r: Any = None
    m_u: Any = None
    l_u: Any = None
    s_pr: Any = None
    s_pu: Any = None
    s_pp: Any = None
    s_q: Any = None
    at_p: Any = None
    at_q: Any = None
    at_r: Any = None


@triton.jit
def level(m):
    """What is taken off logits with the maximum m: −inf would leave no number."""
    return tl.where(m == MINUS_INF, 0.0, m)


@triton.jit
def scale(m, new_m):
    """exp(m − new_m); 0 where nothing has been summed yet."""
    return tl.where(m == MINUS_INF, 0.0, tl.exp(m - level(new_m)))


@triton.jit
def rescale_sum(s, total, shift, alpha):
    """A sum of contrasts after its level has moved by `shift` and its weights by `alpha`; 0 · ∞ = 0."""
    return tl.where(alpha == 0.0, 0.0, alpha * (s + total * shift))


@triton.jit
def weighted(prob, contrast):
    """Σ prob · contrast over the columns, with 0 · ∞ = 0."""
    return tl.sum(tl.where(prob == 0.0, 0.0, prob * contrast), 1)


@triton.jit
def add_exp_sum(total, m, new_m, z):
    """Σ exp(z − m) with the columns z."""
    return total * scale(m, new_m) + tl.sum(tl.exp(z - level(new_m)[:, None]), 1)


@triton.jit
def at_tokens(z, tokens, columns):
    return tl.sum(tl.where(columns[None, :] == tokens[:, None], z, 0.0), 1)


@triton.jit
def entries(split, rows, n_rows):
    """Where the partial numbers of a split stand, in int64."""
    return (split + tl.zeros(rows.shape, tl.int64)) * n_rows + rows


@triton.jit
def store(x, split, rows, value, n_rows):
    if x is not None:
        tl.store(x + entries(split, rows, n_rows), value, mask=rows < n_rows)


@triton.jit
def sweep_kernel(
    h_p, w_p, h_q, w_q, h_r, w_r, p, q, r, targets, out, shape, n_splits, n_steps, ignore_index,
    SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, MAPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Partial statistics of BLOCK_N tokens over n_steps vocabulary blocks."""
    n_rows = shape.n_rows
    block, split = place(tl.cdiv(n_rows, BLOCK_N), n_splits, GROUP)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    start = split * n_steps
    stop = tl.minimum(start + n_steps, tl.cdiv(shape.n_vocab, BLOCK_V))
    if targets is not None:
        tokens = tl.load(targets + rows, mask=rows < n_rows, other=ignore_index)
        # A block of ignored tokens has nothing to sweep.
        stop = tl.where(tl.max((tokens != ignore_index).to(tl.int32), 0) > 0, stop, start)

    zero = tl.zeros([BLOCK_N], tl.float32)
    m_p = zero + MINUS_INF
    m_q, m_r, m_u = m_p, m_p, m_p
    l_p, l_q, l_r, l_u = zero, zero, zero, zero
    s_pr, s_pu, s_pp, s_q = zero, zero, zero, zero
    at_p, at_q, at_r = zero, zero, zero
    stream_p = Operands(h_p, w_p, p, p.n_d if h_p is not None else 0)
    stream_q = Operands(h_q, w_q, q, q.n_d if h_q is not None else 0)
    stream_r = Operands(h_r, w_r, r, r.n_d if h_r is not None else 0)
    for step in range(start, stop):
        column = step * BLOCK_V
        z_p, z_q, z_r, u = logits_tile(
            stream_p, stream_q, stream_r, shape, row, column,
            Config(BLOCK_N, BLOCK_V, BLOCK_D, MAPS, INTERPRET), SHARE, out.m_u is not None,
        )  # fmt: skip
        new_q, new_r, new_u = m_q, m_r, m_u
        if out.m_q is not None:
            new_q = tl.maximum(m_q, tl.max(z_q, 1))
        if out.m_r is not None:
            new_r = tl.maximum(m_r, tl.max(z_r, 1))
        if out.m_u is not None:
            new_u = tl.maximum(m_u, tl.max(u, 1))
        if out.l_q is not None:
            l_q = add_exp_sum(l_q, m_q, new_q, z_q)
        if out.l_r is not None:
            l_r = add_exp_sum(l_r, m_r, new_r, z_r)
        if out.l_u is not None:
            l_u = add_exp_sum(l_u, m_u, new_u, u)
        if out.m_p is not None:
            new_p = tl.maximum(m_p, tl.max(z_p, 1))
            alpha = scale(m_p, new_p)
            shift = level(m_p) - level(new_p)
            high = z_p - level(new_p)[:, None]
            prob = tl.exp(high)
            if out.s_pp is not None:
                s_pp = rescale_sum(s_pp, l_p, shift, alpha) + weighted(prob, high)
            if out.s_pr is not None:
                other = level(m_r) - level(new_r)
                contrast = high - (z_r - level(new_r)[:, None])
                s_pr = rescale_sum(s_pr, l_p, shift - other, alpha) + weighted(prob, contrast)
            if out.s_pu is not None:
                other = level(m_u) - level(new_u)
                contrast = high - (u - level(new_u)[:, None])
                s_pu = rescale_sum(s_pu, l_p, shift - other, alpha) + weighted(prob, contrast)
            if out.s_q is not None:
                other = level(m_q) - level(new_q)
                s_q = rescale_sum(s_q, l_p, other, alpha) + weighted(prob, z_q - level(new_q)[:, None])
            l_p = l_p * alpha + tl.sum(prob, 1)
            m_p = new_p
        m_q, m_r, m_u = new_q, new_r, new_u
        if targets is not None:
            columns = column + tl.arange(0, BLOCK_V)
            if out.at_p is not None:
                at_p += at_tokens(z_p, tokens, columns)
            if out.at_q is not None:
                at_q += at_tokens(z_q, tokens, columns)
            if out.at_r is not None:
                at_r += at_tokens(z_r, tokens, columns)

    store(out.m_p, split, rows, m_p, n_rows)
    store(out.l_p, split, rows, l_p, n_rows)
    store(out.m_q, split, rows, m_q, n_rows)
    store(out.l_q, split, rows, l_q, n_rows)
    store(out.m_r, split, rows, m_r, n_rows)
    store(out.l_r, split, rows, l_r, n_rows)
    store(out.m_u, split, rows, m_u, n_rows)
    store(out.l_u, split, rows, l_u, n_rows)
    store(out.s_pr, split, rows, s_pr, n_rows)
    store(out.s_pu, split, rows, s_pu, n_rows)
    store(out.s_pp, split, rows, s_pp, n_rows)
    store(out.s_q, split, rows, s_q, n_rows)
    store(out.at_p, split, rows, at_p, n_rows)
    store(out.at_q, split, rows, at_q, n_rows)
    store(out.at_r, split, rows, at_r, n_rows)


@triton.jit
def read(x, split, rows, n_rows):
    """A partial statistic of one split as float64, 0 where there is none."""
    if x is None:
        return tl.zeros(rows.shape, tl.float64)
    else:
        return tl.load(x + entries(split, rows, n_rows), mask=rows < n_rows, other=0.0).to(tl.float64)


@triton.jit
def log_sum(m, total, m_k, total_k):
    """The maximum and Σ exp(z − maximum) of two sets of columns together."""
    new_m = tl.maximum(m, m_k)
    return new_m, total * scale(m, new_m) + total_k * scale(m_k, new_m)


@triton.jit
def write(x, rows, value, live, n_rows):
    if x is not None:
        tl.store(x + rows, tl.where(live, value, 0.0), mask=rows < n_rows)


@triton.jit
def merge_kernel(part, targets, out, n_rows, n_splits, ignore_index, BLOCK: tl.constexpr):
    """The statistics `out` (a VocabStats of pointers to float64) from the splits, taken in order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < n_rows
    if targets is not None:
        live = tl.load(targets + rows, mask=live, other=ignore_index) != ignore_index
    zero = tl.zeros([BLOCK], tl.float64)
    m_p = zero + MINUS_INF
    m_q, m_r, m_u = m_p, m_p, m_p
    l_p, l_q, l_r, l_u = zero, zero, zero, zero
    s_pr, s_pu, s_pp, s_q = zero, zero, zero, zero
    at_p, at_q, at_r = zero, zero, zero
    for k in range(n_splits):
        mk_p, lk_p = read(part.m_p, k, rows, n_rows), read(part.l_p, k, rows, n_rows)
        mk_q, mk_r = read(part.m_q, k, rows, n_rows), read(part.m_r, k, rows, n_rows)
        mk_u = read(part.m_u, k, rows, n_rows)
        new_q, l_q = log_sum(m_q, l_q, mk_q, read(part.l_q, k, rows, n_rows))
        new_r, l_r = log_sum(m_r, l_r, mk_r, read(part.l_r, k, rows, n_rows))
        new_u, l_u = log_sum(m_u, l_u, mk_u, read(part.l_u, k, rows, n_rows))
        new_p, new_l = log_sum(m_p, l_p, mk_p, lk_p)
        old, new = scale(m_p, new_p), scale(mk_p, new_p)
        # How far the level of each plane moves, for what was summed before and for this split.
        p, p_k = level(m_p) - level(new_p), level(mk_p) - level(new_p)
        q, q_k = level(m_q) - level(new_q), level(mk_q) - level(new_q)
        r, r_k = level(m_r) - level(new_r), level(mk_r) - level(new_r)
        u, u_k = level(m_u) - level(new_u), level(mk_u) - level(new_u)
        add_pp, add_pr = read(part.s_pp, k, rows, n_rows), read(part.s_pr, k, rows, n_rows)
        add_pu, add_q = read(part.s_pu, k, rows, n_rows), read(part.s_q, k, rows, n_rows)
        s_pp = rescale_sum(s_pp, l_p, p, old) + rescale_sum(add_pp, lk_p, p_k, new)
        s_pr = rescale_sum(s_pr, l_p, p - r, old) + rescale_sum(add_pr, lk_p, p_k - r_k, new)
        s_pu = rescale_sum(s_pu, l_p, p - u, old) + rescale_sum(add_pu, lk_p, p_k - u_k, new)
        s_q = rescale_sum(s_q, l_p, q, old) + rescale_sum(add_q, lk_p, q_k, new)
        at_p += read(part.at_p, k, rows, n_rows)
        at_q += read(part.at_q, k, rows, n_rows)
        at_r += read(part.at_r, k, rows, n_rows)
        l_p, m_p, m_q, m_r, m_u = new_l, new_p, new_q, new_r, new_u
    write(out.lse_p, rows, level(m_p) + tl.log(l_p), live, n_rows)
    write(out.lse_q, rows, level(m_q) + tl.log(l_q), live, n_rows)
    write(out.lse_r, rows, level(m_r) + tl.log(l_r), live, n_rows)
    write(out.lse_u, rows, level(m_u) + tl.log(l_u), live, n_rows)
    write(out.e_pr, rows, s_pr / l_p + (level(m_p) - level(m_r)), live, n_rows)
    write(out.e_pu, rows, s_pu / l_p + (level(m_p) - level(m_u)), live, n_rows)
    write(out.e_pp, rows, s_pp / l_p - tl.log(l_p), live, n_rows)
    write(out.e_q, rows, s_q / l_p + level(m_q), live, n_rows)
    write(out.at_p, rows, at_p, live, n_rows)
    write(out.at_q, rows, at_q, live, n_rows)
    write(out.at_r, rows, at_r, live, n_rows)


def forward_launches(problem: Problem, outs: dict[int, Tensor], target: Target) -> list[Launch]:
    """The sweep and the merge that write the statistics `outs`, by index, [N ≥ 1] float64 each."""
    n_rows, n_vocab = problem.n_rows, problem.n_vocab
    planes = planes_of(problem, outs)
    own: set[int] = set().union(*(READS[k] for k in outs)) - {U}
    inputs = prepare(problem, "forward", planes, own, set(), target)
    n_blocks, n_columns = triton.cdiv(n_rows, inputs.tile.block_n), triton.cdiv(n_vocab, inputs.tile.block_v)
    n_steps = steps_of(n_blocks, n_columns, target.n_processors, sizes.WAVES)
    n_splits = triton.cdiv(n_columns, n_steps)
    slots = slots_of(set(outs))
    space = torch.empty(len(slots), n_splits, n_rows, dtype=torch.float32, device=problem.device)
    partial = Partial(**dict(zip(slots, space, strict=True)))
    sweep_args = (*inputs.matrices, *inputs.parts, problem.targets, partial, shape_of(problem, n_vocab),
                  n_splits, n_steps, problem.ignore_index)  # fmt: skip
    merge_args = (partial, problem.targets, named(outs), n_rows, n_splits, problem.ignore_index)
    merge_options = sizes.COMPILER | {"BLOCK": sizes.MERGE_ROWS, "num_warps": 4}
    return [
        Launch(sweep_kernel, (n_blocks * n_splits,), sweep_args, inputs.constants, True, inputs.name),
        Launch(merge_kernel, (triton.cdiv(n_rows, sizes.MERGE_ROWS),), merge_args, merge_options),
    ]


@lru_cache
def steps_of(n_blocks: int, n_columns: int, n_processors: int, waves: int = sizes.WAVES) -> int:
    """Vocabulary blocks of a program, so that few processors wait for the last wave of programs.

    A program takes a whole multiprocessor, for its registers. waves: of programs, at least.
    """
    fewest = min(n_columns, -(-waves * n_processors // n_blocks))
    best, least = n_columns, 1.0
    for n_splits in range(fewest, n_columns + 1):
        n_steps = -(-n_columns // n_splits)
        n_waves = -(-n_blocks * -(-n_columns // n_steps) // n_processors)
        idle = 1.0 - n_blocks * n_columns / (n_processors * n_waves * n_steps)
        if idle < least:
            best, least = n_steps, idle
        if idle <= sizes.MOST_IDLE:
            break
    return best


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


def forward(problem: Problem, fields: Sequence[int]) -> list[Tensor]:
    """The statistics `fields`, [N] float64 each."""
    outs = {k: torch.empty(problem.n_rows, dtype=torch.float64, device=problem.device) for k in fields}
    if problem.n_rows:
        run(forward_launches(problem, outs, target_of(problem.device)), problem.device)
    return [outs[k] for k in fields]
