"""GRPO: returns normalised over the batch, a ratio a token, and the KL to the reference in the loss.

`--grpo` names its corrections: `dapo` (a mean over all tokens), `dr` (no division by the deviation, nor by
the length), `gspo` (one ratio an action, the geometric mean of its tokens'). Sources: Shao 2024,
arXiv:2402.03300; Yu 2025, arXiv:2503.14476; Liu 2025, arXiv:2503.20783; Zheng 2025, arXiv:2507.18071.
"""

import torch
from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.learners import Credit, UpdateLog
from etpo.engine.models.roles import Roles
from etpo.engine.policy_gradient import OneNetwork, climb, look_at
from etpo.engine.replay import Action
from etpo.engine.returns import RetryReturn
from etpo.engine.surrogates import grpo_loss, normalised
from etpo.kernels import Stream


class GrpoLearner(OneNetwork[RetryReturn]):
    """The policy alone."""

    def __init__(self, roles: Roles, config: Config) -> None:
        super().__init__(roles, config, RetryReturn())

    def update(self, fresh: list[Action]) -> UpdateLog:
        """Steps of the policy on the fresh actions."""
        config = self.config
        seen = look_at(self.roles, fresh, config.gamma)
        rewards = torch.tensor([action.reward for action in seen.batch.actions], dtype=torch.float64)
        returns = self.memory.returns(seen, rewards)
        centred = returns - returns.mean() if config.grpo == "dr" else normalised(returns)
        advantage = centred.float().to(seen.logprob_mu.device)

        def loss_of(policy: Stream, logprob_K: Tensor) -> Tensor:
            return grpo_loss(
                logprob_K, seen.logprob_mu, seen.logprob_ref, advantage, seen.lengths, config.grpo,
                beta=config.beta, low=config.clip_low, high=config.clip_high,
            )  # fmt: skip

        loss, kl, share = climb(self.roles, self.optimizer, seen, loss_of, config)
        credit = Credit(seen.batch.actions, seen.per_token(advantage), seen.logprob_ref)
        return UpdateLog(kl, share, None, loss, returns.mean().item(), None, credit)
