"""The policy that drew some actions beside the reference: how far it has moved, how spread it is."""

import numpy as np
import torch
from torch import Tensor

from etpo.engine.losses import kl_and_entropy, logprob_and_entropy
from etpo.engine.models.roles import Role, Roles
from etpo.engine.models.sequences import Sequences
from etpo.engine.replay import Action, ActionBatch, collate, known


@torch.no_grad()
def behaviour(roles: Roles, acts: Role, fresh: list[Action], gamma: float) -> tuple[float, float]:
    """(KL(π‖π̄), entropy) of the role that drew the fresh actions, means in nat a token."""
    batch = collate(fresh, gamma)
    hidden = torch.cat([known(action.hidden) for action in batch.actions])
    stream = roles.stream(acts, hidden)
    if acts == "reference":
        _, entropy = logprob_and_entropy(stream, batch.tokens_K.to(hidden.device))
        return 0.0, entropy.mean().item()
    hidden_ref = reference_hidden(roles, batch)[: batch.n_tokens]
    kl, entropy = kl_and_entropy(stream, roles.stream("reference", hidden_ref))
    return kl.mean().item(), entropy.mean().item()


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
