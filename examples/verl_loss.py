"""verl's policy loss with log-probabilities and exact KL of etpo.kernels; needs `pip install verl`.

verl's own functions make the loss; only what they are fed comes from hidden states instead of logits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla

from etpo.kernels import linear_kl, linear_logprob
from etpo.kernels.causal_lm import head_of, heads_of, stream_of


def actor_loss(
    actor: nn.Module, reference: nn.Module, batch: dict[str, Tensor], config: Any, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Any]]:
    """verl's clipped loss + kl_loss_coef·KL(π ‖ π̄), the KL exact at every response token.

    Args:
        batch: as verl's actor has it: input_ids, attention_mask [B, T], responses, response_mask,
            old_log_probs, advantages [B, R].
        config: verl's ActorConfig.
        temperature: of the rollout.

    Returns:
        the loss, and verl's metrics.
    """
    responses, mask = batch["responses"], batch["response_mask"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = stream_of(actor, temperature=temperature, **inputs)
    with torch.no_grad():
        base = stream_of(reference, temperature=temperature, **inputs)
    window = slice(-responses.shape[1] - 1, -1)
    log_prob, _ = linear_logprob(own.hidden[:, window], own.weight, responses, **head_of(own))
    kl = linear_kl(
        own.hidden[:, window], own.weight, base.hidden[:, window], base.weight.detach(),
        mask=mask.bool(), **heads_of(own, base),
    )  # fmt: skip
    loss, metrics = compute_policy_loss_vanilla(
        batch["old_log_probs"], log_prob, batch["advantages"], mask, config.loss_agg_mode, config
    )
    penalty = agg_loss(loss_mat=kl, loss_mask=mask, loss_agg_mode=config.loss_agg_mode)
    return loss + config.kl_loss_coef * penalty, metrics | {"actor/exact_kl": penalty.item()}
