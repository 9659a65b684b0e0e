"""TRL's GRPOTrainer with log-probabilities and entropies from etpo.kernels; needs `pip install trl`.

One method is overridden. The loss, sampling, rewards and logging stay TRL's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from etpo.kernels import linear_logprob


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
        causal_lm = self.accelerator.unwrap_model(model)
        head = causal_lm.get_output_embeddings()
        parts = []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            with self.accelerator.autocast():
                states = causal_lm.base_model(
                    input_ids=ids, attention_mask=mask, use_cache=False
                ).last_hidden_state
                targets = ids.masked_fill(mask == 0, -100)[:, -logits_to_keep:]
                parts.append(
                    linear_logprob(
                        states[:, -logits_to_keep - 1 : -1],
                        head.weight,
                        targets,
                        bias=head.bias,
                        temperature=self.temperature,
                    )
                )
        logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logprobs, entropies if compute_entropy else None, None
