"""The policy that drew some actions beside the reference: how far it has moved, how spread it is."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etpo.engine.losses import beside, logprob_and_entropy
from etpo.engine.models.roles import Role, Roles
from etpo.engine.models.sequences import Sequences
from etpo.engine.replay import Action, ActionBatch, collate, known


@dataclass(frozen=True)
class Behaviour:
    """What is known of the policy that drew some actions, at each of their K tokens, nat.

    Attributes:
        actions: the actions, in the order of the rows.
        logprob, kl, entropy: [K], log π(w_k), KL(π(·|x_k) ‖ π̄(·|x_k)), and the entropy of π(·|x_k).
    """

    actions: list[Action]
    logprob: Tensor
    kl: Tensor
    entropy: Tensor


@torch.no_grad()
def behaviour(roles: Roles, acts: Role, fresh: list[Action], gamma: float) -> Behaviour:
    """Of the role that drew the fresh actions; see `Behaviour`."""
    batch = collate(fresh, gamma)
    hidden = torch.cat([known(action.hidden) for action in batch.actions])
    stream = roles.stream(acts, hidden)
    tokens = batch.tokens_K.to(hidden.device)
    if acts == "reference":
        logprob, entropy = logprob_and_entropy(stream, tokens)
        return Behaviour(batch.actions, logprob, torch.zeros_like(entropy), entropy)
    hidden_ref = reference_hidden(roles, batch)[: batch.n_tokens]
    kl, logprob, entropy = beside(stream, roles.stream("reference", hidden_ref), tokens)
    return Behaviour(batch.actions, logprob, kl, entropy)


@torch.no_grad()
def reference_hidden(roles: Roles, batch: ActionBatch) -> Tensor:
    """The reference's hidden states [K + M, D]; computed once in an action's life, then kept with it."""
    new = [a for a in batch.actions if a.hidden_ref is None]
    if new:
        prompts, suffixes = [], []
        for action in new:
            prompts.append(action.prompt[:-1])
            suffixes.append(torch.cat((action.prompt[-1:], action.tokens[:-1])))
            if action.next_prompt is not None:
                prompts.append(action.next_prompt[:-1])
                suffixes.append(action.next_prompt[-1:])
        hidden = roles.hidden("reference", Sequences(prompts, suffixes))
        lengths = [len(a.tokens) + (a.next_prompt is not None) for a in new]
        for action, rows in zip(new, hidden.split(lengths), strict=True):
            action.hidden_ref = rows.clone()
    own = [known(a.hidden_ref)[: len(a.tokens)] for a in batch.actions]
    goes_on = batch.trace_goes_on_K.tolist()
    ends = np.cumsum([len(a.tokens) for a in batch.actions]) - 1
    bootstraps = [
        known(a.hidden_ref)[-1:] for a, end in zip(batch.actions, ends, strict=True)
        if not a.terminated and not goes_on[end]
    ]  # fmt: skip
    return torch.cat(own + bootstraps)
