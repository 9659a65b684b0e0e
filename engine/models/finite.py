"""Numbers that are none: what a model that has diverged is known by."""

import torch
from torch import Tensor

from etpo import EtpoError

WHAT_TO_DO = (
    "earlier checkpoints are whole; start again with a smaller --lr, --critic-lr or --value-lr, or with "
    "--dtype float32"
)


class Diverged(EtpoError, ArithmeticError):
    """A loss, a weight or a logit is NaN or infinite."""


@torch.no_grad()
def check_weights(named: dict[str, torch.nn.Parameter], role: str, where: str = "") -> None:
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
