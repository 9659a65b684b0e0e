"""Surrogate losses of policy-gradient baselines, as pure functions of tokens; each agrees with TRL's.

Sources: PPO, Schulman 2017, arXiv:1707.06347; RLOO, Ahmadian 2024, arXiv:2402.14740; GRPO, Shao 2024,
arXiv:2402.03300; Dr. GRPO, Liu 2025, arXiv:2503.20783; DAPO, Yu 2025, arXiv:2503.14476; GSPO, Zheng 2025,
arXiv:2507.18071.
"""

from typing import Literal

import torch
from torch import Tensor

GrpoForm = Literal["grpo", "dapo", "dr", "gspo"]


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """−min(ρ·A, clip(ρ, 1 − low, 1 + high)·A), elementwise; ρ = exp(log_ratio).

    Args:
        log_ratio: log π/μ of a token or of a whole action, with gradient.
        advantage: A of the same shape, without gradient.
        low, high: how far ρ may fall below or rise above 1 and still give a gradient.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def k3(logprob: Tensor, logprob_ref: Tensor) -> Tensor:
    """π̄/π − 1 − log(π̄/π) at the drawn token: an unbiased estimate of KL(π ‖ π̄) that is never negative.

    Its gradient is not that of the KL, and huge where π is far below π̄; `etpo.kernels.linear_kl` is exact.
    """
    log_ratio = logprob_ref - logprob
    return log_ratio.exp() - 1.0 - log_ratio


def leave_one_out(returns: Tensor) -> Tensor:
    """R_i − mean of the others' R, [A]; 0 where there is no other."""
    n = len(returns)
    return (returns - returns.mean()) * (n / (n - 1)) if n > 1 else torch.zeros_like(returns)


def normalised(x: Tensor) -> Tensor:
    """(x − mean)/(deviation + 10⁻⁴), the deviation as of a sample; 0 for a single number."""
    return (x - x.mean()) / (x.std() + 1e-4) if len(x) > 1 else torch.zeros_like(x)


def grpo_loss(
    logprob_K: Tensor, logprob_mu_K: Tensor, logprob_ref_K: Tensor, advantage_A: Tensor, lengths: list[int],
    form: GrpoForm, *, beta: float, low: float, high: float, max_length: int = 0,
) -> Tensor:  # fmt: skip
    """GRPO's loss and its corrections, scalar: mean clipped surrogate + β·k3.

    `grpo`: mean over actions of the mean over tokens. `dapo`: mean over all tokens. `dr`: sum over tokens,
    divided by a constant, actions × `max_length` (the longest action of the batch where that is 0). `gspo`:
    one ratio an action, exp of its mean log-ratio, and then as `grpo`.

    Args:
        logprob_K: log π(w_k) with gradient; the others without.
        advantage_A: one an action.
        lengths: L of each action.
    """
    log_ratio = logprob_K - logprob_mu_K
    if form == "gspo":
        means = torch.stack([x.mean() for x in log_ratio.split(lengths)])
        log_ratio = torch.cat([m.expand(n) for m, n in zip(means, lengths, strict=True)])
    advantage_K = torch.cat([a.expand(n) for a, n in zip(advantage_A, lengths, strict=True)])
    loss_K = clipped(log_ratio, advantage_K, low, high) + beta * k3(logprob_K, logprob_ref_K)
    if form == "dapo":
        return loss_K.mean()
    if form == "dr":
        return loss_K.sum() / (len(lengths) * (max_length or max(lengths)))
    return torch.stack([x.mean() for x in loss_K.split(lengths)]).mean()
