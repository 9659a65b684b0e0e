"""ETPO with a value of token states: soft Bellman targets for every token, a policy that moves to π̄·exp(Q/β).

Inside an action the next state is known from the token, so that Q(x_k, w_k) = ρ_k + d_k·V(x_{k+1}): a value
of token states says of the tokens drawn all that a Q function over the vocabulary would. The policy descends
β·KL(π ‖ π_Q) = −E_π[Q] + β·KL(π ‖ π̄) + V*, the paper's loss, both expectations by the tokens that were
drawn. One network moves; V is a regression in closed form (`etpo.engine.values`). `etpo-q` is the paper's
way, with a second network for Q.
"""

import math

import torch
from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.learners import Credit, UpdateLog
from etpo.engine.models.roles import Roles
from etpo.engine.policy_gradient import Fresh, OneNetwork, climb, look_at
from etpo.engine.replay import Action
from etpo.engine.targets import retrace_targets
from etpo.engine.values import PrefixValue, state_features, weights_and_folds
from etpo.kernels import Stream


class EtpoLearner(OneNetwork[PrefixValue]):
    """The policy, and a regression for V of token states."""

    def __init__(self, roles: Roles, config: Config) -> None:
        super().__init__(roles, config, PrefixValue())

    def update(self, fresh: list[Action]) -> UpdateLog:
        """Targets from V, steps of the policy on the fresh actions."""
        config = self.config
        seen = look_at(self.roles, fresh, config.gamma)
        y, v, q = self.targets(seen)
        advantage = y - v
        size = seen.per_action(advantage.abs()) / torch.tensor(seen.lengths, device=advantage.device)

        def loss_of(policy: Stream, logprob_K: Tensor) -> Tensor:
            # Progress along an action, Σ A_k·log(π/μ)_k in units of its mean |A|: the log-ratio of the
            # action where all its tokens have one advantage, bounded on one side as PPO bounds it.
            progress = seen.per_action(advantage * (logprob_K - seen.logprob_mu)) / size
            return -(size * progress.clamp_max(math.log1p(config.clip_high))).mean()

        loss, kl, share = climb(self.roles, self.optimizer, seen, loss_of, config)
        return UpdateLog(
            kl, share, advantage.square().mean().item(), loss, y.mean().item(), v.mean().item(),
            Credit(seen.batch.actions, advantage, seen.logprob_ref, q, v),
        )  # fmt: skip

    def targets(self, seen: Fresh) -> tuple[Tensor, Tensor, Tensor]:
        """(y, V, Q) [K] at the drawn tokens; afterwards V has learned their returns.

        y_k = ρ_k − β·log(μ/π̄)(w_k) + d_k·[(1 − λ)·V(x_{k+1}) + λ·y_{k+1}], the log-ratio an estimate of the
        KL at x_k: so V is the soft value V_π(x) = E_π[Q] − β·KL(π ‖ π̄), and y − V has mean 0 where V is
        right. Q(x_k, w_k) = ρ_k + d_k·V(x_{k+1}) is for who looks on; no step depends on it.
        """
        batch, n = seen.batch, seen.batch.n_tokens
        features = state_features(batch, seen.hidden_ref, seen.logprob_ref, seen.entropy_ref)
        log_ratio = (seen.logprob_mu - seen.logprob_ref).double().cpu()
        reward = batch.reward_K.double() - self.config.beta * log_ratio

        def targets(v: Tensor, lam: float) -> Tensor:
            return retrace_targets(
                reward, batch.discount_K.double(), v[batch.next_K], v[:n], torch.full_like(reward, lam),
                batch.trace_goes_on_K,
            )  # fmt: skip

        v = self.memory.regress(features, *weights_and_folds(batch), lambda v: targets(v, 1.0))
        device = seen.logprob_mu.device
        q = batch.reward_K.double() + batch.discount_K.double() * v[batch.next_K]
        y = targets(v, self.config.lam_in_force)
        return y.float().to(device), v[:n].float().to(device), q.float().to(device)
