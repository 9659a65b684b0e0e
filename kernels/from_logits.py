"""The public functions on logits that a trainer already has."""

import torch
from etpo.kernels import reference
from etpo.kernels.dispatch import sweep_of
from etpo.kernels.streams import check_positive, check_targets, check_tensor
from torch import Tensor


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log π(w), entropy of π) at each token, π = softmax(logits / temperature), in nats.

    logits [N, V] or [B, T, V], targets [N] or [B, T]: both results [N] or [B, T], float32 (float64 for float64
    logits); rows with targets == ignore_index are 0. Raises ValueError for input that does not fit.
    """
    (z,), shape, dtype = _checked(backend, logits=logits)
    temperature = check_positive("temperature", temperature)
    flat_targets = check_targets(targets, shape, z.shape[1], z.device, ignore_index)
    fields = ("lse_p", "e_pp", "at_p")
    stats = reference.logit_statistics(
        [z / temperature, None, None], flat_targets, (1.0, 1.0), ignore_index, fields
    )
    logprob = stats["at_p"] - stats["lse_p"]
    return logprob.to(dtype).reshape(shape), (-stats["e_pp"]).to(dtype).reshape(shape)


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) of π = softmax(logits / temperature), π̄ = softmax(ref_logits / temperature), in nats.

    Both [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for input that does not fit.
    """
    (z_p, z_r), shape, dtype = _checked(backend, logits=logits, ref_logits=ref_logits)
    temperature = check_positive("temperature", temperature)
    fields = ("lse_p", "lse_r", "e_pr")
    scaled: list[Tensor | None] = [z_p / temperature, None, z_r / temperature]
    stats = reference.logit_statistics(scaled, None, (1.0, 1.0), -100, fields)
    return (stats["e_pr"] - stats["lse_p"] + stats["lse_r"]).to(dtype).reshape(shape)


def soft_value_from_logits(
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """V* = β·(lse(ref_logits + q_logits/β) − lse ref_logits), [N] or [B, T], in reward units.

    Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    (z_q, z_r), shape, dtype = _checked(backend, q_logits=q_logits, ref_logits=ref_logits)
    fields = ("lse_r", "lse_u")
    stats = reference.logit_statistics([None, z_q, z_r], None, (1.0, 1.0 / beta), -100, fields)
    return (beta * (stats["lse_u"] - stats["lse_r"])).to(dtype).reshape(shape)


def soft_policy_kl_from_logits(
    logits: Tensor,
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄·exp(Q/β)/Z) of π = softmax(logits), π̄ = softmax(ref_logits), Q = q_logits, in nats.

    All [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    (z_p, z_q, z_r), shape, dtype = _checked(backend, logits=logits, q_logits=q_logits, ref_logits=ref_logits)
    fields = ("lse_p", "lse_u", "e_pu")
    stats = reference.logit_statistics([z_p, z_q, z_r], None, (1.0, 1.0 / beta), -100, fields)
    return (stats["e_pu"] - stats["lse_p"] + stats["lse_u"]).to(dtype).reshape(shape)


def _checked(backend: str, **named: Tensor) -> tuple[list[Tensor], torch.Size, torch.dtype]:
    """The named logits flat [N, V] in the dtype of the result, the shape of the result, and that dtype."""
    first_name, first = next(iter(named.items()))
    if not isinstance(first, Tensor) or first.dim() not in (2, 3) or first.shape[-1] < 1:
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{first_name}: expected shape [N, V] or [B, T, V] with V ≥ 1, got {got}")
    for name, tensor in named.items():
        check_tensor(name, tensor, tuple(first.shape), first.device)
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(f"{name}: float64 does not mix with {first.dtype}, got {tensor.dtype}")
    sweep_of(backend, first.device)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    flat = [tensor.reshape(-1, first.shape[-1]).to(dtype) for tensor in named.values()]
    return flat, first.shape[:-1], dtype
