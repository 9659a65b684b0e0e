"""The optimisers of the two trained roles."""

from collections.abc import Callable, Iterable
from typing import Any

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


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW without decay (the KL to the reference is the regulariser), or Lion."""
    if name == "lion":
        return Lion(groups, lr)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
