"""The chunked backend: one reused workspace, any device, any dtype; the way to each of its two sweeps."""

from torch import Tensor

from etpo.kernels.chunked import rowwise
from etpo.kernels.chunked.gather import gather
from etpo.kernels.chunked.rowwise_op import rowwise_numbers
from etpo.kernels.chunked.sweep_op import sweep
from etpo.kernels.streams import KL_FIELDS, LOG_RATIO_FIELDS, Problem, kl_of, log_ratio_of

__all__ = ["gather", "kl", "log_ratio", "sweep"]


def kl(problem: Problem, *, in_place: bool = False) -> Tensor:
    """KL(softmax z_p ‖ softmax u), [N] float64."""
    numbers = rowwise_numbers(problem, rowwise.KL)
    return kl_of(sweep(problem, KL_FIELDS, in_place=in_place)) if numbers is None else numbers


def log_ratio(problem: Problem, *, in_place: bool = False) -> Tensor:
    """lse u − lse z_r, [N] float64."""
    numbers = rowwise_numbers(problem, rowwise.LOG_RATIO)
    return log_ratio_of(sweep(problem, LOG_RATIO_FIELDS, in_place=in_place)) if numbers is None else numbers
