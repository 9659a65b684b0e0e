"""Which backend runs a problem, and what a backend is."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from etpo.kernels import chunked, reference
from etpo.kernels.streams import Problem

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


def backend_of(name: str, device: torch.device) -> Backend:
    """The backend called `name` for tensors on `device`. Raises ValueError where there is none."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    if name == "triton":
        raise ValueError(f"backend: 'triton' is not available for tensors on {device}; use 'auto'")
    return REFERENCE if name == "reference" else CHUNKED
