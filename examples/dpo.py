"""Direct preference optimisation with log-probabilities from etpo.kernels: no [B, T, V] tensor of logits.

    loss = −log σ(β·[(log π(y⁺) − log π̄(y⁺)) − (log π(y⁻) − log π̄(y⁻))])          (arXiv:2305.18290)

Run it: `python examples/dpo.py` trains a tiny random model on random preferences in seconds.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from etpo.kernels import linear_logprob
from etpo.kernels.causal_lm import head_of, stream_of


def sequence_logprob(model: PreTrainedModel, input_ids: Tensor, is_response: Tensor) -> Tensor:
    """Σ log π(token) over the response, [B]. input_ids, is_response (True on response tokens): [B, T]."""
    stream = stream_of(model, input_ids=input_ids)
    targets = input_ids.masked_fill(~is_response, -100)[:, 1:]
    logprob, _ = linear_logprob(stream.hidden[:, :-1], stream.weight, targets, **head_of(stream))
    return logprob.sum(-1)


def dpo_loss(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    chosen: tuple[Tensor, Tensor],
    rejected: tuple[Tensor, Tensor],
    beta: float = 0.1,
) -> Tensor:
    """Mean loss; chosen and rejected are (input_ids, is_response) each."""
    with torch.no_grad():
        base = [sequence_logprob(reference, *pair) for pair in (chosen, rejected)]
    better, worse = (sequence_logprob(policy, *pair) for pair in (chosen, rejected))
    return -F.logsigmoid(beta * ((better - base[0]) - (worse - base[1]))).mean()


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes))
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    is_response = (torch.arange(12) >= 4).expand(8, 12)
    chosen, rejected = ((torch.randint(101, (8, 12)), is_response) for _ in range(2))
    for step in range(20):
        loss = dpo_loss(policy, reference, chosen, rejected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
