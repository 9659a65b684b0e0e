"""A run that diverges ends at once, with a line, before a checkpoint takes the place of a good one."""

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etpo import EtpoError
from etpo.engine.learners import UpdateLog

if TYPE_CHECKING:  # drawing actions imports this, and the roles' models import nothing that draws
    from etpo.engine.models.roles import Role, Roles

WHAT_TO_DO = (
    "earlier checkpoints are whole; start again with a smaller --lr, --critic-lr or --value-lr, or with "
    "--dtype float32"
)


class Diverged(EtpoError, ArithmeticError):
    """A loss, a weight or a logit is NaN or infinite."""


def check_update(log: UpdateLog | None, roles: "Roles", moves: "Iterable[Role]", step: int) -> None:
    """Look at what an update did. (A gradient that is not finite makes the weights that it moves so.)

    Args:
        log: its numbers, or None where nothing was updated.
        roles: with the weights after it.
        moves: the roles that have weights of their own.
        step: programs executed so far, for the message.

    Raises:
        Diverged: a number of `log`, or a weight, is not finite.
    """
    for name, value in dataclasses.asdict(log).items() if log else ():
        if value is not None and not math.isfinite(value):
            raise Diverged(f"step {step}: expected a finite {name}, got {value}; {WHAT_TO_DO}")
    for role in moves:
        check_weights(roles.parameters(role), role, f"step {step}: ")


@torch.no_grad()
def check_weights(named: "dict[str, torch.nn.Parameter]", role: str, where: str = "") -> None:
    """Diverged where a weight of a role is not finite."""
    for name, parameter in named.items():
        if not parameter.isfinite().all():
            raise Diverged(
                f"{where}expected finite weights, got NaN or infinity in {name} of the {role}; {WHAT_TO_DO}"
            )


def check_logprobs(logprobs: Tensor) -> None:
    """Diverged where a row of log-probabilities to draw from holds NaN, as one of infinite logits does."""
    if logprobs.isnan().any():
        raise Diverged(f"expected finite logits to draw from, got NaN or infinity; {WHAT_TO_DO}")
