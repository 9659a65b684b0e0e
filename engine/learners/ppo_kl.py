"""PPO-KL, the paper's baseline: PPO of whole actions, with the KL to the reference in the reward.

One ratio and one advantage an action, GAE over the time steps of an episode, a value of the prompt.
Source: ETPO, arXiv:2402.06700, section 5; PPO, Schulman 2017, arXiv:1707.06347.
"""

from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.learners import Credit, UpdateLog
from etpo.engine.models.roles import Roles
from etpo.engine.policy_gradient import OneNetwork, climb, look_at
from etpo.engine.replay import Action
from etpo.engine.returns import action_rewards, advantages_over_time
from etpo.engine.surrogates import clipped, normalised
from etpo.engine.values import PrefixValue
from etpo.kernels import Stream


class PpoKlLearner(OneNetwork[PrefixValue]):
    """The policy, and a regression for the value of a prompt."""

    def __init__(self, roles: Roles, config: Config) -> None:
        super().__init__(roles, config, PrefixValue())

    def update(self, fresh: list[Action]) -> UpdateLog:
        """Steps of the policy on the fresh actions."""
        config = self.config
        seen = look_at(self.roles, fresh, config.gamma)
        rewards = action_rewards(seen, config.beta)
        advantage, v = advantages_over_time(seen, self.memory, rewards, config.lam_in_force)
        scaled = normalised(advantage).float().to(seen.logprob_mu.device)

        def loss_of(policy: Stream, logprob_K: Tensor) -> Tensor:
            log_ratio = seen.per_action(logprob_K - seen.logprob_mu)
            return clipped(log_ratio, scaled, config.clip_low, config.clip_high).mean()

        loss, kl, share = climb(self.roles, self.optimizer, seen, loss_of, config)
        q, error = (advantage + v).mean().item(), advantage.square().mean().item()
        credit = Credit(
            seen.batch.actions, seen.per_token(advantage), seen.logprob_ref, seen.per_token(advantage + v),
            seen.per_token(v),
        )  # fmt: skip
        return UpdateLog(kl, share, error, loss, q, v.mean().item(), credit)
