"""One bounded step: how far an update may move the policy, measured by the exact KL on the fresh tokens."""

import math

import torch

from etpo.engine.losses import detached, stream_kl
from etpo.engine.models.finite import check_weights
from etpo.engine.models.roles import Roles
from etpo.engine.replay import ActionBatch, known

QUADRATIC_TRIES = 5
OVERSHOT = 0.1  # of a step shortened to less than this, the momentum points far out of where it may go
SMALLEST_SHARE = 1e-6  # below it, rounding is larger than the step


class BoundedStep:
    """Remembers the policy as it is before an update, and then shortens the step that the update made.

    Args:
        roles: of these, the policy.
        fresh: actions that the policy drew as it is now; each with `hidden`.
    """

    def __init__(self, roles: Roles, fresh: ActionBatch) -> None:
        self.roles, self.fresh = roles, fresh
        before = roles.stream("policy", torch.cat([known(action.hidden) for action in fresh.actions]))
        head_moves = before.weight.requires_grad
        before = detached(before)
        if head_moves:
            bias = None if before.bias is None else before.bias.clone()
            before = before._replace(weight=before.weight.clone(), bias=bias)
        self._before = before
        self._parameters = list(roles.parameters("policy").values())
        self._anchor = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def shorten(self, bound: float) -> tuple[float, float]:
        """Shorten the step until KL(π_before ‖ π_after) on the fresh tokens keeps to the bound.

        The KL of a short step grows with its square, so θ ← θ₀ + √(bound/KL)·(θ − θ₀) lands near the bound.
        Where it does not in a few tries, the step shrinks at least by half each time: it is never dropped
        while a shorter one would do.

        Returns:
            the KL, mean in nat a token, and the share of the step that was kept.

        Raises:
            Diverged: the step left weights that are not finite.
        """
        share, tries = 1.0, 0
        sequences = self.fresh.sequences()
        while share >= SMALLEST_SHARE:
            after = self.roles.stream("policy", self.roles.hidden("policy", sequences))
            kl = stream_kl(self._before, after).mean().item()
            if not math.isfinite(kl):
                check_weights(self.roles.parameters("policy"), "policy")
            if kl <= bound:
                return kl, share
            factor = 0.95 * (bound / kl) ** 0.5 if math.isfinite(kl) else 0.1
            if tries >= QUADRATIC_TRIES:
                factor = min(factor, 0.5)
            share, tries = share * factor, tries + 1
            for p, start in zip(self._parameters, self._anchor, strict=True):
                p.sub_(start).mul_(factor).add_(start)
        for p, start in zip(self._parameters, self._anchor, strict=True):
            p.copy_(start)
        return 0.0, 0.0
