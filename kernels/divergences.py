"""Divergences of two heads, z-loss and label smoothing: a few lines each on the public functions.

All give one number a token, [N] or [B, T], in nats, differentiable in both streams: detach what stays fixed.
They raise ValueError as the functions that they are made of.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etpo.kernels.checks import build_problem, is_number
from etpo.kernels.losses import divergence, linear_logprob, vocab_stats
from etpo.kernels.plan import P, R
from etpo.kernels.reference import source_logits
from etpo.kernels.streams import Source, Stream

# Logits of one head that `jensen_shannon` holds at a time.
CHUNK_ELEMENTS = 1 << 23


def forward_kl(student: Stream, teacher: Stream, *, backend: str = "auto") -> Tensor:
    """KL(teacher ‖ student) = E_t[log t − log s]: where the teacher has mass, the student must have some."""
    return divergence(teacher, None, student, (1.0, 0.0), backend=backend)


def reverse_kl(student: Stream, teacher: Stream, *, backend: str = "auto") -> Tensor:
    """KL(student ‖ teacher) = E_s[log s − log t]: no mass of the student where the teacher has none."""
    return divergence(student, None, teacher, (1.0, 0.0), backend=backend)


def alpha_divergence(student: Stream, teacher: Stream, alpha: float, *, backend: str = "auto") -> Tensor:
    """D_α = (1 − Σ t^α·s^(1−α)) / (α·(1 − α)), 0 < α < 1; α → 1 gives the forward KL, α → 0 the reverse.

    Σ t^α·s^(1−α) = exp(lse u − α·lse t − (1 − α)·lse s) with u = α·z_t + (1 − α)·z_s (Amari 1985).
    Between heads that are close, the difference to 1 is small beside the rounding of the statistics, about
    1e-7 of the size of the logits.
    """
    if not is_number(alpha) or not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    alpha = float(alpha)
    # The policy's place is empty: u is mixed of the critic's (student) and the reference's (teacher).
    stats = vocab_stats(None, student, teacher, mix=(alpha, 1.0 - alpha), backend=backend)
    overlap = _there(stats.lse_u) - alpha * _there(stats.lse_r) - (1.0 - alpha) * _there(stats.lse_q)
    return -torch.expm1(overlap) / (alpha * (1.0 - alpha))


def jensen_shannon(student: Stream, teacher: Stream, share: float = 0.5) -> Tensor:
    """share·KL(t ‖ m) + (1 − share)·KL(s ‖ m), m = share·t + (1 − share)·s, 0 < share < 1 (Lin 1991).

    log m is no mixture of logits, so no sweep gives it: plain PyTorch on chunks of tokens, each made again in
    backward. Two planes of logits of a chunk are in memory at a time, whatever the number of tokens.
    """
    if not is_number(share) or not 0.0 < share < 1.0:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    problem, shape = build_problem(student, None, teacher)
    rows = max(1, CHUNK_ELEMENTS // problem.n_vocab)
    sources = problem.streams[P], problem.streams[R]
    parts = []
    for start in range(0, max(1, problem.n_rows), rows):
        chunk = (source._replace(hidden=source.hidden[start : start + rows]) for source in sources)
        parts.append(checkpoint(_jensen_shannon_rows, *chunk, float(share), use_reentrant=False))
    return torch.cat(parts).reshape(shape)


def _jensen_shannon_rows(student: Source, teacher: Source, share: float) -> Tensor:
    # Below this a probability is 0 in float64 too, and a logarithm of 0 has no gradient.
    log_s, log_t = (source_logits(x).log_softmax(-1).clamp(min=-1e4) for x in (student, teacher))
    log_m = torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))
    of_teacher, of_student = ((x.exp() * (x - log_m)).sum(-1) for x in (log_t, log_s))
    return share * of_teacher + (1.0 - share) * of_student


def z_loss(stream: Stream, *, backend: str = "auto") -> Tensor:
    """lse(z)², which keeps the logits of a head from drifting (Chowdhery 2022); weigh it by about 1e-4."""
    return _there(vocab_stats(stream, backend=backend).lse_p).square()


def smoothed_cross_entropy(
    stream: Stream, targets: Tensor, smoothing: float, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """−(1 − ε)·log π(w) − ε·mean_v log π(v): cross-entropy against the target mixed with the uniform.

    ε = smoothing, 0 ≤ ε < 1 (Szegedy 2016). A row with target ignore_index is 0 and gives no gradient.
    mean_v log π(v) = −log V − KL(uniform ‖ π), where the uniform is a head of zeros; a token that π masks
    makes it infinite.
    """
    if not is_number(smoothing) or not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing: expected a number from 0 to below 1, got {smoothing!r}")
    hidden, weight = stream.hidden, stream.weight
    logprob, _ = linear_logprob(
        hidden, weight, targets, bias=stream.bias, lora=stream.lora, temperature=stream.temperature,
        softcap=stream.softcap, ignore_index=ignore_index, backend=backend,
    )  # fmt: skip
    n_vocab = weight.shape[0]
    uniform = Stream(hidden.new_zeros(*hidden.shape[:-1], 1), weight.new_zeros(n_vocab, 1))
    mean = -math.log(n_vocab) - divergence(uniform, None, stream, (1.0, 0.0), backend=backend)
    smoothed = -(1.0 - smoothing) * logprob - smoothing * mean
    return smoothed.masked_fill(targets == ignore_index, 0.0)


def _there(statistic: Tensor | None) -> Tensor:
    assert statistic is not None
    return statistic
