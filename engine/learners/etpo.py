"""Stages 4 and 5 of the loop: targets from the slow critic, losses, one bounded step.

The learner sees models only through the `Roles` protocol: a language model and the table of a small MDP run
the same code.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.losses import critic_loss, detached, policy_loss, q_of_tokens, stream_kl
from etpo.engine.models.roles import FINAL_GAIN, SCALAR_HEAD, Role, Roles, polyak
from etpo.engine.models.sequences import Sequences
from etpo.engine.optim import LEARNING_RATES, LearningRates, make_optimizer
from etpo.engine.replay import Action, ActionBatch, Replay, collate
from etpo.engine.targets import (
    mix_of,
    prefix_sums,
    replay_weights,
    retrace_targets,
    token_values,
    trace_coefficients,
)
from etpo.kernels import Stream, linear_logprob, vocab_stats


class Targets(NamedTuple):
    """What stage 4 hands to stage 5; all [K], no gradient.

    Attributes:
        y: the soft Bellman target of each drawn token.
        q, v: Q̄ and V̄ of the target network, for the log.
        logprob_ref, z_ref: log π̄(w) and z_ref(w).
        hidden_ref: [K, D], the reference's hidden states.
        weight: of each token in the critic's loss; None: all alike.
    """

    y: Tensor
    q: Tensor
    v: Tensor
    logprob_ref: Tensor
    z_ref: Tensor
    hidden_ref: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class UpdateLog:
    """Means over the update's minibatches, and how far the policy moved.

    Attributes:
        loss_q, loss_pi: the two losses.
        q_mean, v_mean: Q̄ and V̄ over action tokens, in reward units.
        kl_update: mean KL(π_before ‖ π_after) in nat a token on the fresh actions.
        step_share: the share of the policy's step that was kept (1 unless the bound cut it).
    """

    loss_q: float
    loss_pi: float
    q_mean: float
    v_mean: float
    kl_update: float
    step_share: float


class Learner:
    """Optimisers, and the two updates of ETPO on batches of actions.

    Args:
        roles: policy, critic, target and reference.
        config: the update's part of a run's configuration.

    Attributes:
        optimizers: one for each trained role.
        optimized: the names of its parameters, in the optimiser's order.
    """

    def __init__(self, roles: Roles, config: Config) -> None:
        self.roles, self.config = roles, config
        self._optimizer_name, self._rates = optimizer_of(config, roles.form)
        # Where nothing normalises z_Q, weights that fade with failure leave only drift upward: measured, both
        # other forms then run away from the reference.
        automatic = "truncated" if config.q_form == "normalised" else "none"
        chosen = automatic if config.replay_weight == "auto" else config.replay_weight
        self._weighs_replay = chosen == "truncated"
        self.optimized: dict[Role, list[str]] = {}
        self.optimizers: dict[Role, torch.optim.Optimizer] = {
            "policy": self._optimizer("policy", self._rates.policy),
            "critic": self._optimizer("critic", self._rates.critic),
        }

    def update(self, fresh: list[Action], replay: Replay, rng: np.random.Generator) -> UpdateLog:
        """Several minibatch steps from the replay buffer; together they move the policy by a bounded KL.

        Args:
            fresh: the actions of this iteration, drawn by the policy as it is now; each with `hidden`.
            replay: the buffer that already holds them.
            rng: draws the minibatches.
        """
        config = self.config
        fresh_batch = collate(fresh, config.gamma)
        before = self.roles.stream("policy", torch.cat([_known(a.hidden) for a in fresh_batch.actions]))
        head_moves = before.weight.requires_grad
        before = detached(before)
        if head_moves:
            bias = None if before.bias is None else before.bias.clone()
            before = before._replace(weight=before.weight.clone(), bias=bias)
        params = list(self.roles.parameters("policy").values())
        anchor = [p.detach().clone() for p in params]
        logs = []
        for _ in range(config.updates_per_batch):
            batch = collate(replay.sample(config.minibatch, rng), config.gamma)
            logs.append(self.step(batch))
        kl, share = self._bound_step(before, fresh_batch, params, anchor)
        for action in fresh:
            action.hidden = None
        loss_q, loss_pi, q_mean, v_mean = np.mean(logs, axis=0).tolist()
        return UpdateLog(loss_q, loss_pi, q_mean, v_mean, kl, share)

    def step(self, batch: ActionBatch) -> tuple[float, float, float, float]:
        """Targets, both losses, one optimiser step each, Polyak: (L_Q, L_π, mean Q̄, mean V̄)."""
        config, roles = self.config, self.roles
        targets = self.targets(batch)
        sequences = batch.sequences()
        tokens_K = batch.tokens_K.to(targets.y.device)
        critic = roles.stream("critic", roles.hidden("critic", sequences))
        # The scalar head only reads the critic: its error is 1/β times that of the logits, and through the
        # shared body it would move π_Q at random.
        v_head = None if config.q_form == "logits" else roles.value("critic", critic.hidden.detach())
        if v_head is not None and config.q_form == "normalised":
            with torch.no_grad():
                logprob, _ = linear_logprob(
                    critic.hidden, critic.weight, tokens_K, bias=critic.bias,
                    temperature=critic.temperature, softcap=critic.softcap,
                )  # fmt: skip
            v_head = v_head + self._told_by_prefix(logprob - targets.logprob_ref, batch)
        q = q_of_tokens(
            critic, v_head, targets.logprob_ref, targets.z_ref, tokens_K, config.q_form, config.beta
        )
        policy = roles.stream("policy", roles.hidden("policy", sequences))
        reference = roles.stream("reference", targets.hidden_ref)
        loss_q = critic_loss(q, targets.y, config.huber_delta, targets.weight)
        loss_pi = policy_loss(policy, critic, reference, config.q_form, config.beta)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        (loss_q + loss_pi).backward()
        for role, optimizer in self.optimizers.items():
            torch.nn.utils.clip_grad_norm_(list(roles.parameters(role).values()), config.clip_norm)
            optimizer.step()
        polyak(roles, config.tau)
        return loss_q.item(), loss_pi.item(), targets.q.mean().item(), targets.v.mean().item()

    @torch.no_grad()
    def targets(self, batch: ActionBatch) -> Targets:
        """Retrace(λ) targets of every token of the batch from the target network."""
        config, roles = self.config, self.roles
        n = batch.n_tokens
        sequences = batch.sequences(bootstraps=True)
        hidden = roles.hidden("target", sequences)
        hidden_ref = self.reference_hidden(batch)
        device = hidden.device
        tokens = batch.tokens_K.to(device)
        drawn = torch.cat((tokens, tokens.new_zeros(len(hidden) - n)))
        policy = None
        if config.backup == "expected":
            policy = roles.stream("policy", roles.hidden("policy", sequences))
        stats: Any = vocab_stats(
            policy,
            critic=roles.stream("target", hidden),
            reference=roles.stream("reference", hidden_ref),
            targets=drawn,
            mix=mix_of(config.q_form, config.beta),
        )
        v_head = None if config.q_form == "logits" else roles.value("target", hidden)
        if v_head is not None and config.q_form == "normalised":
            ratio = (stats.at_q - stats.lse_q) - (stats.at_r - stats.lse_r)
            v_head = v_head.clone()
            v_head[:n] += self._told_by_prefix(ratio[:n], batch)
        values = token_values(stats, v_head, config.q_form, config.beta)
        if config.backup == "expected":
            assert values.v_expected is not None
            v, logprob = values.v_expected, stats.at_p - stats.lse_p
        else:
            v, logprob = values.v_soft, values.logprob_soft
        logprob, logprob_mu = logprob[:n], batch.logprob_mu_K.to(device)
        weight = None
        if self._weighs_replay:
            weight = replay_weights(logprob, logprob_mu, [len(a.tokens) for a in batch.actions]).float()
        y = retrace_targets(
            batch.reward_K.to(device),
            batch.discount_K.to(device),
            v[batch.next_K.to(device)].float(),
            values.q[:n].float(),
            trace_coefficients(logprob, logprob_mu, config.lam).float(),
            batch.trace_goes_on_K.to(device),
        )
        return Targets(
            y=y,
            q=values.q[:n],
            v=v[:n],
            logprob_ref=(stats.at_r - stats.lse_r)[:n],
            z_ref=stats.at_r[:n],
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

    @torch.no_grad()
    def reference_hidden(self, batch: ActionBatch) -> Tensor:
        """[K + M, D]; computed once in an action's life, then kept with it."""
        new = [a for a in batch.actions if a.hidden_ref is None]
        if new:
            prompts, suffixes = [], []
            for action in new:
                prompts.append(action.prompt[:-1])
                suffixes.append(torch.cat((action.prompt[-1:], action.tokens[:-1])))
                if action.next_prompt is not None:
                    prompts.append(action.next_prompt[:-1])
                    suffixes.append(action.next_prompt[-1:])
            hidden = self.roles.hidden("reference", Sequences(prompts, suffixes))
            lengths = [len(a.tokens) + (a.next_prompt is not None) for a in new]
            for action, rows in zip(new, hidden.split(lengths), strict=True):
                action.hidden_ref = rows.clone()
        own = [_known(a.hidden_ref)[: len(a.tokens)] for a in batch.actions]
        goes_on = batch.trace_goes_on_K.tolist()
        ends = np.cumsum([len(a.tokens) for a in batch.actions]) - 1
        bootstraps = [
            _known(a.hidden_ref)[-1:] for a, end in zip(batch.actions, ends, strict=True)
            if not a.terminated and not goes_on[end]
        ]  # fmt: skip
        return torch.cat(own + bootstraps)

    @torch.no_grad()
    def _bound_step(
        self, before: Stream, batch: ActionBatch, params: list[torch.nn.Parameter], anchor: list[Tensor]
    ) -> tuple[float, float]:
        """Shorten the policy's step until KL(π_before ‖ π_after) on the fresh tokens keeps to the bound.

        The KL of a short step grows with its square, so θ ← θ₀ + √(bound/KL)·(θ − θ₀) lands near the bound;
        after five tries the step is taken back whole.
        """
        bound, share = self.config.max_kl_update, 1.0
        sequences = batch.sequences()
        for _ in range(5):
            after = self.roles.stream("policy", self.roles.hidden("policy", sequences))
            kl = stream_kl(before, after).mean().item()
            if kl <= bound:
                return kl, share
            factor = 0.95 * (bound / kl) ** 0.5 if np.isfinite(kl) else 0.0
            share *= factor
            for p, start in zip(params, anchor, strict=True):
                p.sub_(start).mul_(factor).add_(start)
            if factor == 0.0:
                break
        for p, start in zip(params, anchor, strict=True):
            p.copy_(start)
        return 0.0, 0.0

    def _optimizer(self, role: Role, lr: float) -> torch.optim.Optimizer:
        """Groups of weights with step sizes of their own; `optimized` keeps their order.

        The final norm's gain scales every logit of the model: a policy turns sharper, and slips of the pen
        rarer, by this one direction, which the small step of the other weights would hardly move. With a step
        in proportion to its squared norm, its logarithm moves alike in every model. The scalar head: v starts
        at 0 and has to cross the whole range of returns, or its lag pushes every drawn token the same way.
        """
        named = self.roles.parameters(role)
        gain = {name: p for name, p in named.items() if name == FINAL_GAIN}
        head = {name: p for name, p in named.items() if name.startswith(SCALAR_HEAD)}
        body = {name: p for name, p in named.items() if name not in gain and name not in head}
        groups: list[dict[str, Any]] = [{"params": list(body.values()), "lr": lr}]
        for parameter in gain.values():
            share = self._rates.gain
            factor = 1.0 if share is None else share * parameter.detach().float().square().sum().item()
            groups.append({"params": [parameter], "lr": lr * factor})
        if head:
            groups.append({"params": list(head.values()), "lr": self._rates.value})
        self.optimized[role] = [*body, *gain, *head]
        return make_optimizer(self._optimizer_name, groups, lr)


def optimizer_of(config: Config, form: str) -> tuple[str, LearningRates]:
    """The optimiser's name and step sizes: as configured, or those that suit the form of the roles."""
    name = config.optimizer
    if name == "auto":
        name = "adamw" if form == "lora" else "sgd"
    rates = LEARNING_RATES[name]
    given = {"policy": config.lr, "critic": config.critic_lr, "value": config.value_lr}
    return name, rates._replace(**{role: lr for role, lr in given.items() if lr is not None})


def _known(hidden: Tensor | None) -> Tensor:
    assert hidden is not None
    return hidden
