"""Which backend runs a problem, and what a backend is."""

import os
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from etpo.kernels import reference
from etpo.kernels.chunked import ways as chunked
from etpo.kernels.streams import Problem
from etpo.kernels.triton import operators as triton_op

BACKENDS = ("auto", "reference", "chunked", "triton")


class SweepFunction(Protocol):
    def __call__(
        self, problem: Problem, fields: tuple[str, ...], *, in_place: bool = False
    ) -> dict[str, Tensor]: ...


class NumberFunction(Protocol):
    def __call__(self, problem: Problem, *, in_place: bool = False) -> Tensor: ...


class GatherFunction(Protocol):
    def __call__(self, problem: Problem) -> Tensor: ...


class Backend(NamedTuple):
    """Per-token numbers of a problem, [N] each, differentiable; float64, or the dtype of the results.

    sweep: the named statistics; kl: KL(softmax z_p ‖ softmax u); log_ratio: lse u − lse z_r; gather: z_q at
    the targets. in_place: backward may overwrite given logits with their gradient.
    """

    sweep: SweepFunction
    kl: NumberFunction
    log_ratio: NumberFunction
    gather: GatherFunction


REFERENCE = Backend(reference.sweep, reference.kl, reference.log_ratio, reference.gather)
CHUNKED = Backend(chunked.sweep, chunked.kl, chunked.log_ratio, chunked.gather)

TRITON = Backend(triton_op.sweep, triton_op.kl, triton_op.log_ratio, triton_op.gather)

# What "auto" takes where "triton" can run. No GPU has been measured yet, so it takes "triton" throughout:
# it alone keeps the logits out of memory.
AUTO_ON_CUDA = TRITON
# Below it, bf16 has no matrix units.
CAPABILITY = (8, 0)


def backend_of(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name` for results of `dtype` on `device`. Raises ValueError where there is none."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    if name == "reference":
        return REFERENCE
    if name == "triton":
        refusal = _refusal(device, dtype)
        if refusal is not None:
            raise ValueError(f"backend: 'triton' {refusal}; use 'auto'")
        return TRITON
    if name == "auto" and device.type == "cuda" and _refusal(device, dtype) is None:
        return AUTO_ON_CUDA
    return CHUNKED


def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "triton" cannot run; None where it can."""
    if dtype == torch.float64:
        return "takes float32, bfloat16 and float16, got torch.float64"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= CAPABILITY else f"needs compute capability 8.0 or more, got {capability}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"runs on CUDA, on a CPU only with TRITON_INTERPRET=1 from the start, got tensors on {device}"
