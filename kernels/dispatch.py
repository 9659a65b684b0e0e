"""Which backend runs a sweep."""

from collections.abc import Callable

import torch
from etpo.kernels import chunked, reference
from etpo.kernels.streams import Problem
from torch import Tensor

BACKENDS = ("auto", "reference", "chunked", "triton")

Sweep = Callable[[Problem, tuple[str, ...]], dict[str, Tensor]]


def sweep_of(backend: str, device: torch.device) -> Sweep:
    """The sweep of `backend` for tensors on `device`: (problem, fields) to the named statistics, each [N]."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        raise ValueError(f"backend: 'triton' is not available here (tensors on {device}); use 'auto'")
    return reference.sweep if backend == "reference" else chunked.sweep
