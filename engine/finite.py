"""A run that diverges ends at once, with a line, before a checkpoint takes the place of a good one."""

import math
from collections.abc import Iterable

from etpo.engine.learners import UpdateLog
from etpo.engine.models.finite import WHAT_TO_DO, Diverged, check_weights
from etpo.engine.models.roles import Role, Roles


def check_update(log: UpdateLog | None, roles: Roles, moves: Iterable[Role], step: int) -> None:
    """Look at what an update did. (A gradient that is not finite makes the weights that it moves so.)

    Args:
        log: its numbers, or None where nothing was updated.
        roles: with the weights after it.
        moves: the roles that have weights of their own.
        step: programs executed so far, for the message.

    Raises:
        Diverged: a number of `log`, or a weight, is not finite.
    """
    for name, value in log.numbers().items() if log else ():
        if value is not None and not math.isfinite(value):
            raise Diverged(f"step {step}: expected a finite {name}, got {value}; {WHAT_TO_DO}")
    for role in moves:
        check_weights(roles.parameters(role), role, f"step {step}: ")
