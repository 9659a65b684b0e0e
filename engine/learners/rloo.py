"""RLOO: the return of a whole action less the mean return of the others in its batch.

No value, no normalisation; the KL to the reference stands in the reward. Source: Ahmadian 2024,
arXiv:2402.14740.
"""

from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.learners import Credit, UpdateLog
from etpo.engine.models.roles import Roles
from etpo.engine.policy_gradient import OneNetwork, climb, look_at
from etpo.engine.replay import Action
from etpo.engine.returns import RetryReturn, action_rewards
from etpo.engine.surrogates import clipped, leave_one_out
from etpo.kernels import Stream


class RlooLearner(OneNetwork[RetryReturn]):
    """The policy alone."""

    def __init__(self, roles: Roles, config: Config) -> None:
        super().__init__(roles, config, RetryReturn())

    def update(self, fresh: list[Action]) -> UpdateLog:
        """Steps of the policy on the fresh actions."""
        config = self.config
        seen = look_at(self.roles, fresh, config.gamma)
        returns = self.memory.returns(seen, action_rewards(seen, config.beta))
        advantage = leave_one_out(returns).float().to(seen.logprob_mu.device)

        def loss_of(policy: Stream, logprob_K: Tensor) -> Tensor:
            log_ratio = seen.per_action(logprob_K - seen.logprob_mu)
            return clipped(log_ratio, advantage, config.clip_low, config.clip_high).mean()

        loss, kl, share = climb(self.roles, self.optimizer, seen, loss_of, config)
        credit = Credit(seen.batch.actions, seen.per_token(advantage), seen.logprob_ref)
        return UpdateLog(kl, share, None, loss, returns.mean().item(), None, credit)
