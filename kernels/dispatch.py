"""Which backend runs a problem, and what a backend is."""

from typing import Protocol

import torch
from etpo.kernels import gather, reference, rowwise, rowwise_op, sweep_op
from etpo.kernels.streams import Problem
from torch import Tensor

BACKENDS = ("auto", "reference", "chunked", "triton")


class Backend(Protocol):
    """Per-token numbers of a problem, [N] each, differentiable, in float64 or the dtype of the results."""

    def sweep(self, problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
        """The named statistics. in_place: backward may overwrite given logits with their gradient."""
        ...

    def kl(self, problem: Problem) -> Tensor:
        """KL(softmax z_p ‖ softmax u)."""
        ...

    def log_ratio(self, problem: Problem) -> Tensor:
        """lse_u − lse_r."""
        ...

    def gather(self, problem: Problem) -> Tensor:
        """z_q at the targets."""
        ...


class Reference:
    """Every logit materialised, derivatives by autograd."""

    def sweep(self, problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
        return reference.sweep(problem, fields)

    def kl(self, problem: Problem, *, in_place: bool = False) -> Tensor:
        stats = self.sweep(problem, ("lse_p", "lse_u", "e_pu"), in_place=in_place)
        return stats["e_pu"] - stats["lse_p"] + stats["lse_u"]

    def log_ratio(self, problem: Problem, *, in_place: bool = False) -> Tensor:
        stats = self.sweep(problem, ("lse_r", "lse_u"), in_place=in_place)
        return stats["lse_u"] - stats["lse_r"]

    def gather(self, problem: Problem) -> Tensor:
        return self.sweep(problem, ("at_q",))["at_q"]
