"""TRL's GRPOTrainer with log-probabilities and entropies from etpo.kernels; needs `pip install trl`.

One method is overridden. The loss, sampling, rewards and logging stay TRL's. With a `peft_config` the
policy's adapter is in force, and for the reference it is off, as TRL says.
"""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from etpo.kernels import linear_logprob
from etpo.kernels.causal_lm import head_of, stream_of


class KernelGRPOTrainer(GRPOTrainer):
    """GRPOTrainer for text models with a plain linear head, without a [B, T, V] tensor of logits."""

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probabilities, entropies or None, None), [B, logits_to_keep]; 0 at masked tokens."""
        extra = [name for name, value in inputs.items() if value is not None]
        if extra or compute_aux_loss:
            raise ValueError(
                f"model: expected one of text alone, without experts, got {extra or 'an auxiliary loss'}"
            )
        own = self.accelerator.unwrap_model(model)
        parts = []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            with self.accelerator.autocast():
                policy = stream_of(own, input_ids=ids, attention_mask=mask, temperature=self.temperature)
                states = policy.hidden[:, -logits_to_keep - 1 : -1]
                targets = ids.masked_fill(mask == 0, -100)[:, -logits_to_keep:]
                parts.append(linear_logprob(states, policy.weight, targets, **head_of(policy)))
        logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logprobs, entropies if compute_entropy else None, None
