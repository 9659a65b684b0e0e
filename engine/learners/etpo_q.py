"""ETPO (arXiv:2402.06700): a soft Q function over tokens, and a policy that follows it.

The learner sees models only through the `Roles` protocol: a language model and the table of a small MDP run
the same code.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from etpo.engine.behaviour import reference_hidden
from etpo.engine.config import Config
from etpo.engine.learners import Credit, UpdateLog
from etpo.engine.losses import critic_at_tokens, critic_loss, policy_loss, q_of_tokens
from etpo.engine.models.roles import Role, Roles, polyak
from etpo.engine.optim import optimizers_of
from etpo.engine.replay import Action, ActionBatch, Replay, collate
from etpo.engine.step import OVERSHOT, BoundedStep
from etpo.engine.targets import (
    expected_value,
    mix_of,
    prefix_sums,
    replay_weights,
    retrace_targets,
    token_stats,
    token_values,
    trace_coefficients,
)


class Targets(NamedTuple):
    """What stage 4 hands to stage 5; all [K], no gradient.

    Attributes:
        y: the soft Bellman target of each drawn token.
        q, v: Q̄ and V̄ of the target network, for the log.
        at_ref: what Q reads of the reference at the token: log π̄(w) for `normalised`, else z_ref(w).
        hidden_ref: [K, D], the reference's hidden states.
        weight: of each token in the critic's loss; None: all alike.
    """

    y: Tensor
    q: Tensor
    v: Tensor
    at_ref: Tensor
    hidden_ref: Tensor
    weight: Tensor | None


class EtpoQLearner:
    """Optimisers, replay buffer, and the two updates of ETPO on batches of actions.

    Args:
        roles: policy, critic, target and reference.
        config: the update's part of a run's configuration.
    """

    moves: ClassVar[tuple[Role, ...]] = ("policy", "critic", "target")
    acts: ClassVar[Role] = "policy"

    def __init__(self, roles: Roles, config: Config) -> None:
        self.roles, self.config = roles, config
        self.optimizers = optimizers_of(roles, config)
        self.replay = Replay(config.replay_capacity)
        self.rng = np.random.default_rng(config.seed)
        # Where nothing normalises z_Q, weights that fade with failure leave only drift upward: measured, both
        # other forms then run away from the reference.
        automatic = "truncated" if config.q_form == "normalised" else "none"
        chosen = automatic if config.replay_weight == "auto" else config.replay_weight
        self._weighs_replay = chosen == "truncated"

    def update(self, fresh: list[Action]) -> UpdateLog:
        """Several minibatch steps from the replay buffer; together they move the policy by a bounded KL."""
        config = self.config
        self.replay.add(fresh)
        drawn = collate(fresh, config.gamma)
        self.roles.prepare(drawn.sequences())
        step = BoundedStep(self.roles, drawn)
        logs = []
        seen: dict[int, tuple[Action, list[Tensor]]] = {}
        for _ in range(config.updates_per_batch):
            batch = collate(self.replay.sample(config.minibatch, self.rng), config.gamma)
            log, targets = self.step(batch)
            logs.append(log)
            seen |= self._of_fresh(batch, targets)
        kl, share = step.shorten(config.max_kl_in_force)
        if share < OVERSHOT:
            self.optimizers[0].forget()
        for action in fresh:
            action.hidden = None
        loss_q, loss_pi, q_mean, v_mean = np.mean(logs, axis=0).tolist()
        return UpdateLog(kl, share, loss_q, loss_pi, q_mean, v_mean, self._credit(list(seen.values())))

    def _of_fresh(self, batch: ActionBatch, targets: Targets) -> dict[int, tuple[Action, list[Tensor]]]:
        """Of the actions that were just drawn: y, Q̄, V̄ and what was read of the reference, [L] each."""
        lengths = [len(action.tokens) for action in batch.actions]
        columns = (targets.y, targets.q, targets.v, targets.at_ref)
        rows = zip(*(x.split(lengths) for x in columns), strict=True)
        pairs = zip(batch.actions, rows, strict=True)
        return {id(action): (action, list(row)) for action, row in pairs if action.hidden is not None}

    def _credit(self, seen: list[tuple[Action, list[Tensor]]]) -> Credit | None:
        """Of the fresh actions that some minibatch held, in its last one; A = y − V̄."""
        if not seen:
            return None
        y, q, v, at_ref = (torch.cat(parts) for parts in zip(*(row for _, row in seen), strict=True))
        logprob_ref = at_ref if self.config.q_form == "normalised" else None
        return Credit([action for action, _ in seen], y - v, logprob_ref, q, v)

    def step(self, batch: ActionBatch) -> tuple[tuple[float, float, float, float], Targets]:
        """Targets, both losses, one optimiser step each, Polyak: (L_Q, L_π, mean Q̄, mean V̄), the targets."""
        config, roles = self.config, self.roles
        targets = self.targets(batch)
        sequences = batch.sequences()
        critic = roles.stream("critic", roles.hidden("critic", sequences))
        at_critic = critic_at_tokens(critic, batch.tokens_K.to(targets.y.device), config.q_form)
        # The scalar head only reads the critic: its error is 1/β times that of the logits, and through the
        # shared body it would move π_Q at random.
        v_head = None if config.q_form == "logits" else roles.value("critic", critic.hidden.detach())
        if v_head is not None and config.q_form == "normalised":
            v_head = v_head + self._told_by_prefix(at_critic.detach() - targets.at_ref, batch)
        q = q_of_tokens(at_critic, targets.at_ref, v_head, config.q_form, config.beta)
        policy = roles.stream("policy", roles.hidden("policy", sequences))
        reference = roles.stream("reference", targets.hidden_ref)
        loss_q = critic_loss(q, targets.y, config.huber_delta, targets.weight)
        loss_pi = policy_loss(policy, critic, reference, config.q_form, config.beta)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss_q + loss_pi).backward()
        for optimizer in self.optimizers:
            optimizer.step(config.clip_norm)
        polyak(roles, config.tau)
        log = loss_q.item(), loss_pi.item(), targets.q.mean().item(), targets.v.mean().item()
        return log, targets

    @torch.no_grad()
    def targets(self, batch: ActionBatch) -> Targets:
        """Retrace(λ) targets of every token of the batch from the target network."""
        config, roles = self.config, self.roles
        n = batch.n_tokens
        sequences = batch.sequences(bootstraps=True)
        hidden = roles.hidden("target", sequences)
        hidden_ref = reference_hidden(roles, batch)
        device = hidden.device
        tokens = batch.tokens_K.to(device)
        drawn = torch.cat((tokens, tokens.new_zeros(len(hidden) - n)))
        policy = None
        if config.backup == "expected":
            policy = roles.stream("policy", roles.hidden("policy", sequences))
        stats = token_stats(
            policy,
            roles.stream("target", hidden),
            roles.stream("reference", hidden_ref),
            drawn,
            mix_of(config.q_form, config.beta),
        )
        v_head = None if config.q_form == "logits" else roles.value("target", hidden)
        if v_head is not None and config.q_form == "normalised":
            ratio = (stats.at_q - stats.lse_q) - (stats.at_r - stats.lse_r)
            v_head = v_head.clone()
            v_head[:n] += self._told_by_prefix(ratio[:n], batch)
        values = token_values(stats, v_head, config.q_form, config.beta)
        v, logprob = values.v_soft, values.logprob_soft
        if stats.policy is not None:
            v, logprob = expected_value(v, stats.policy, config.beta), stats.policy.logprob
        logprob, logprob_mu = logprob[:n], batch.logprob_mu_K.to(device)
        weight = None
        if self._weighs_replay:
            weight = replay_weights(logprob, logprob_mu, [len(a.tokens) for a in batch.actions]).float()
        y = retrace_targets(
            batch.reward_K.to(device),
            batch.discount_K.to(device),
            v[batch.next_K.to(device)].float(),
            values.q[:n].float(),
            trace_coefficients(logprob, logprob_mu, config.lam_in_force).float(),
            batch.trace_goes_on_K.to(device),
        )
        return Targets(
            y=y,
            q=values.q[:n],
            v=v[:n],
            at_ref=(stats.at_r - stats.lse_r if config.q_form == "normalised" else stats.at_r)[:n],
            hidden_ref=hidden_ref[:n],
            weight=weight,
        )

    def _told_by_prefix(self, log_ratio_K: Tensor, batch: ActionBatch) -> Tensor:
        """β·Σ_{j<k} log(π_Q/π̄)(w_j) [K]: what the tokens drawn so far have already done to the value.

        Inside an action Q(x_k, w_k) = V(x_{k+1}) at the optimum, so V*(x_k) is V* at the action's first token
        plus this sum. With it in v, later tokens are not blamed for a fault that an earlier one explains, and
        the scalar head is left with what the critic's own ratios cannot say.
        """
        return self.config.beta * prefix_sums(log_ratio_K, [len(a.tokens) for a in batch.actions])

    def tensors(self) -> dict[str, Tensor]:
        """The optimisers' moments and the replayed actions."""
        tensors = {f"replay/{name}": packed for name, packed in self.replay.state()[0].items()}
        for optimizer in self.optimizers:
            tensors |= optimizer.tensors()
        return tensors

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "replay": self.replay.state()[1]}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            optimizer.restore(tensors)
        packed = {name[len("replay/") :]: t for name, t in tensors.items() if name.startswith("replay/")}
        device = next(iter(self.roles.parameters("policy").values())).device
        self.replay.restore(packed, state["replay"], device)
        self.rng.bit_generator.state = state["rng"]
