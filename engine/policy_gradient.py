"""What the learners of one network share: parts, what is known of fresh actions, the epochs over them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from etpo.engine.behaviour import reference_hidden
from etpo.engine.config import Config
from etpo.engine.losses import logprob_and_entropy
from etpo.engine.models.roles import Role, Roles
from etpo.engine.optim import RoleOptimizer, policy_optimizer
from etpo.engine.replay import Action, ActionBatch, collate
from etpo.engine.step import OVERSHOT, BoundedStep
from etpo.kernels import Stream


class Memory(Protocol):
    """What a learner remembers of returns from one iteration to the next."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        ...


Remembers = TypeVar("Remembers", bound=Memory)


class OneNetwork(Generic[Remembers]):
    """A `Learner` of the policy alone but for its `update`: the optimiser, a memory, and their checkpoints.

    Args:
        roles: policy and reference.
        config: the update's part of a run's configuration.
        memory: of returns.
    """

    moves: ClassVar[tuple[Role, ...]] = ("policy",)
    acts: ClassVar[Role] = "policy"

    def __init__(self, roles: Roles, config: Config, memory: Remembers) -> None:
        self.roles, self.config, self.memory = roles, config, memory
        self.optimizer = policy_optimizer(roles, config)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's moments, and the memory."""
        return self.optimizer.tensors() | self.memory.tensors()

    def state(self) -> dict[str, Any]:
        """Nothing besides."""
        return {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up what `tensors` gave."""
        self.optimizer.restore(tensors)
        self.memory.restore(tensors)


@dataclass(frozen=True)
class Fresh:
    """The actions of one iteration with the numbers that every learner wants; K token states, no gradient.

    Attributes:
        batch: the actions, packed.
        hidden_ref: [K + M, D], the reference's hidden states, bootstrap states last.
        logprob_ref, entropy_ref: [K], log π̄(w_k) and the entropy of π̄(·|x_k).
        logprob_mu: [K], log μ(w_k).
    """

    batch: ActionBatch
    hidden_ref: Tensor
    logprob_ref: Tensor
    entropy_ref: Tensor
    logprob_mu: Tensor

    @property
    def lengths(self) -> list[int]:
        """L of each action, in tokens."""
        return [len(action.tokens) for action in self.batch.actions]

    def per_action(self, x_K: Tensor) -> Tensor:
        """Σ over an action's tokens, [A]."""
        return torch.stack([x.sum() for x in x_K.split(self.lengths)])

    def per_token(self, x_A: Tensor) -> Tensor:
        """A number of each action at each of its tokens, [K]."""
        return x_A.repeat_interleave(torch.tensor(self.lengths, device=x_A.device))


@torch.no_grad()
def look_at(roles: Roles, actions: list[Action], gamma: float) -> Fresh:
    """The numbers of `Fresh`, from one pass of the reference, which is then kept with the actions."""
    batch = collate(actions, gamma)
    hidden_ref = reference_hidden(roles, batch)
    reference = roles.stream("reference", hidden_ref[: batch.n_tokens])
    device = hidden_ref.device
    logprob_ref, entropy_ref = logprob_and_entropy(reference, batch.tokens_K.to(device))
    return Fresh(batch, hidden_ref, logprob_ref, entropy_ref, batch.logprob_mu_K.to(device))


# (policy's stream with gradient, its log π(w_k) [K] with gradient) -> loss, scalar
PolicyLoss = Callable[[Stream, Tensor], Tensor]


def climb(
    roles: Roles, optimizer: RoleOptimizer, fresh: Fresh, loss_of: PolicyLoss, config: Config
) -> tuple[float, float, float]:
    """`updates_per_batch` steps of the policy on all fresh actions, which together keep to the KL bound.

    Returns:
        the mean loss, the KL of the update in nat a token, and the share of the step that was kept.
    """
    sequences, losses = fresh.batch.sequences(), []
    roles.prepare(sequences)
    step = BoundedStep(roles, fresh.batch)
    tokens = fresh.batch.tokens_K.to(fresh.logprob_mu.device)
    for _ in range(config.updates_per_batch):
        policy = roles.stream("policy", roles.hidden("policy", sequences))
        loss = loss_of(policy, logprob_and_entropy(policy, tokens)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(config.clip_norm)
        losses.append(loss.item())
    kl, share = step.shorten(config.max_kl_in_force)
    if share < OVERSHOT:
        optimizer.forget()
    for action in fresh.batch.actions:
        action.hidden = None
    return sum(losses) / len(losses), kl, share
