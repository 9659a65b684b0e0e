"""OpenRLHF's PolicyLoss with log-probabilities and exact KL of etpo.kernels; needs `pip install openrlhf`.

OpenRLHF's own module makes the loss; only what it is fed comes from hidden states instead of logits.
"""

import torch
from openrlhf.models import PolicyLoss
from torch import Tensor, nn

from etpo.kernels import linear_kl, linear_logprob
from etpo.kernels.causal_lm import head_of, heads_of, stream_of


def actor_loss(
    actor: nn.Module,
    reference: nn.Module,
    policy_loss: PolicyLoss,
    sequences: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    kl_coef: float = 0.01,
) -> Tensor:
    """OpenRLHF's loss + kl_coef·KL(π ‖ π̄), the KL exact at every token of an action.

    sequences, attention_mask: [B, T]; action_mask, old_log_probs, advantages: [B, A], of the last A tokens.
    """
    inputs = {"input_ids": sequences, "attention_mask": attention_mask}
    own = stream_of(actor, **inputs)
    with torch.no_grad():
        base = stream_of(reference, **inputs)
    n = action_mask.shape[1]
    window = slice(-n - 1, -1)
    log_probs, _ = linear_logprob(own.hidden[:, window], own.weight, sequences[:, -n:], **head_of(own))
    is_action = action_mask.bool()
    kl = linear_kl(
        own.hidden[:, window], own.weight, base.hidden[:, window], base.weight.detach(), mask=is_action,
        **heads_of(own, base),
    )  # fmt: skip
    found = policy_loss(log_probs, old_log_probs, advantages, action_mask=action_mask)
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss + kl_coef * kl[is_action].mean()
