"""The optimisers of the two trained roles."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch


class Lion(torch.optim.Optimizer):
    """θ ← θ − lr·sign(β₁·m + (1 − β₁)·g);  m ← β₂·m + (1 − β₂)·g  (Chen 2023, arXiv:2302.06675)."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, momentum, beta1).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1.0 - beta2)


class LearningRates(NamedTuple):
    """Step sizes of policy, critic and the critic's scalar head.

    gain: step of a final norm's gain g, as a share of ‖g‖² times the role's own; None: the role's own.
    """

    policy: float
    critic: float
    value: float
    gain: float | None


# Of a program's hundred tokens, a few decide its reward. Adam gives every weight a step of one size, so that
# those which saw only chance move as far as those which saw the cause; plain momentum moves by evidence: on
# stored programs of the bundled model its critic ranked held-out ones better at the same KL. So did a larger
# step of the gain (see `Learner._optimizer`): programs that fail hold unlikely tokens.
LEARNING_RATES = {
    "sgd": LearningRates(policy=0.5, critic=1.2, value=0.1, gain=0.6),
    "adamw": LearningRates(policy=3e-4, critic=3e-4, value=3e-3, gain=None),
    "lion": LearningRates(policy=3e-5, critic=3e-5, value=3e-4, gain=None),
}


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Momentum SGD, AdamW or Lion; none decays weights (the KL to the reference is the regulariser)."""
    if name == "lion":
        return Lion(groups, lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, foreach=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
