"""Numbers of whole rows of logits, and derivatives in the place of the logits: one kernel, a program a row.

The Triton twin of `derive_rows` of `etpo.kernels.chunked.rowwise`: logits come from library products, and
each row is read twice, once for its sums and once for the derivative that takes its place.
"""

import triton
import triton.language as tl
from torch import Tensor

from etpo.kernels.chunked.rowwise import KL, LOG_RATIO, LOGPROB, Given, Numbers, Wanted
from etpo.kernels.triton import sizes
from etpo.kernels.triton.forward import MINUS_INF, add_exp_sum, level, rescale_sum, scale, weighted
from etpo.kernels.triton.tile import INTERPRET, Launch, rounded, run

KL_ROWS, LOG_RATIO_ROWS, LOGPROB_ROWS = (tl.constexpr(k) for k in (KL, LOG_RATIO, LOGPROB))


@triton.jit
def read_row(x, columns, n_vocab):
    """[1, BLOCK] of a row of logits; −inf beyond the vocabulary."""
    return tl.load(x + columns, mask=columns < n_vocab, other=MINUS_INF)[None, :].to(tl.float32)


@triton.jit
def log_of(m, total):
    """log-sum-exp in float64."""
    return level(m).to(tl.float64) + tl.log(total.to(tl.float64))


@triton.jit
def softmax_of(z, lse):
    """exp(z − lse) of a row, with lse in float64."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    return tl.exp((z - high[:, None]) - low[:, None])


@triton.jit
def write_row(x, columns, value, n_vocab, INTERPRET: tl.constexpr):
    tl.store(x + columns[None, :], rounded(value, x, INTERPRET), mask=(columns < n_vocab)[None, :])


@triton.jit
def row_kernel(
    one, two, tokens, weights, value, entropy, d_one, d_two, stride, stride_d, share, n_vocab,
    KIND: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row: its number in float64, and weight · ∂number/∂plane for the planes that have a place for it.

    A derivative may take the place of its plane. A number that is infinite has a weight of 0.
    """
    row = tl.program_id(0).to(tl.int64)
    one += row * stride
    if two is not None:
        two += row * stride
    d_one += row * stride_d
    if d_two is not None:
        d_two += row * stride_d
    zero = tl.zeros([1], tl.float32)
    m, total, s = zero + MINUS_INF, zero, zero
    m_u, total_u = zero + MINUS_INF, zero
    for start in range(0, n_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = read_row(one, columns, n_vocab)
        new = tl.maximum(m, tl.max(z, 1))
        alpha, shift = scale(m, new), level(m) - level(new)
        if KIND == LOGPROB_ROWS:
            high = z - level(new)[:, None]
            prob = tl.exp(high)
            s = rescale_sum(s, total, shift, alpha) + weighted(prob, high)
            total = total * alpha + tl.sum(prob, 1)
        else:
            u = read_row(two, columns, n_vocab)
            new_u = tl.maximum(m_u, tl.max(u, 1))
            if KIND == KL_ROWS:
                high = z - level(new)[:, None]
                prob = tl.exp(high)
                contrast = high - (u - level(new_u)[:, None])
                s = rescale_sum(s, total, shift - (level(m_u) - level(new_u)), alpha) + weighted(
                    prob, contrast
                )
                total = total * alpha + tl.sum(prob, 1)
            else:
                total = add_exp_sum(total, m, new, z)
            total_u = add_exp_sum(total_u, m_u, new_u, u)
            m_u = new_u
        m = new
    at_row = row + tl.zeros([1], tl.int64)
    lse = log_of(m, total)
    # E_p of the contrast, around the levels of the rows.
    mean = s / total
    if KIND == LOGPROB_ROWS:
        token = tl.load(tokens + at_row)
        number = tl.load(one + token).to(tl.float64) - lse
        tl.store(entropy + at_row, tl.log(total.to(tl.float64)) - mean.to(tl.float64))
        # All have read the target's logit before one overwrites it.
        tl.debug_barrier()
    elif KIND == KL_ROWS:
        lse_u = log_of(m_u, total_u)
        number = mean.to(tl.float64) + (tl.log(total_u.to(tl.float64)) - tl.log(total.to(tl.float64)))
    else:
        lse_u = log_of(m_u, total_u)
        number = lse_u - lse
    tl.store(value + at_row, number)
    if weights is not None:
        weight = tl.load(weights + at_row).to(tl.float32)
        weight = tl.where(tl.abs(number) == float("inf"), 0.0, weight)[:, None]
    for start in range(0, n_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = read_row(one, columns, n_vocab)
        prob = softmax_of(z, lse)
        if KIND == LOGPROB_ROWS:
            dz = tl.where(columns[None, :] == token[:, None], 1.0, 0.0) - prob
        else:
            u = read_row(two, columns, n_vocab)
            prob_u = softmax_of(u, lse_u)
            if KIND == KL_ROWS:
                contrast = (z - level(m)[:, None]) - (u - level(m_u)[:, None]) - mean[:, None]
                dz = tl.where(prob == 0.0, 0.0, prob * contrast)
                du = prob_u - prob
            else:
                dz = share * prob_u - prob
                du = prob_u
            if d_two is not None:
                if weights is not None:
                    du = tl.where(weight == 0.0, 0.0, du * weight)
                write_row(d_two, columns, du, n_vocab, INTERPRET)
        if weights is not None:
            dz = tl.where(weight == 0.0, 0.0, dz * weight)
        write_row(d_one, columns, dz, n_vocab, INTERPRET)


def derive_launch(
    wanted: Wanted, planes: list[Tensor], given: Given, out: Numbers, places: list[Tensor]
) -> Launch:
    """Writes the numbers of the rows `planes`, [n ≥ 1, V] float32 each, and to `places` their derivatives."""
    one, two = planes[0], planes[1] if len(planes) > 1 else None
    d_two = places[1] if wanted.by_u else None
    args = (one, two, given.tokens, given.weights, out.value, out.entropy, places[0], d_two, one.stride(0),
            places[0].stride(0), wanted.share, one.shape[1])  # fmt: skip
    constants = {"KIND": wanted.kind, "BLOCK": sizes.ROW.block_v, "INTERPRET": INTERPRET}
    options = sizes.COMPILER | {"num_warps": sizes.ROW.num_warps}
    return Launch(row_kernel, (one.shape[0],), args, constants | options)


def derive_rows(
    wanted: Wanted, planes: list[Tensor], given: Given, out: Numbers, places: list[Tensor]
) -> None:
    """As `derive_launch`, of any number of rows."""
    if planes[0].shape[0]:
        run([derive_launch(wanted, planes, given, out, places)], planes[0].device)
