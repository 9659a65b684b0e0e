"""Distillation over the whole vocabulary from a teacher of another hidden size, without logits in memory.

    loss = T²·mean KL(teacher ‖ student) at temperature T, or the reverse KL(student ‖ teacher)

Run it: `python examples/distillation.py` teaches a tiny random model in seconds.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from etpo.kernels import linear_kl
from etpo.kernels.causal_lm import heads_of, stream_of


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Mean divergence over all tokens of input_ids [B, T], gradients to the student alone."""
    with torch.no_grad():
        other = stream_of(teacher, temperature=temperature, input_ids=input_ids)
    own = stream_of(student, temperature=temperature, input_ids=input_ids)
    other = other._replace(weight=other.weight.detach())
    p, q = (own, other) if reverse else (other, own)
    divergence = linear_kl(p.hidden, p.weight, q.hidden, q.weight, **heads_of(p, q))
    return temperature**2 * divergence.mean()


def main() -> None:
    torch.manual_seed(0)
    shared = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
    student = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, **shared))
    teacher = LlamaForCausalLM(
        LlamaConfig(hidden_size=48, intermediate_size=96, initializer_range=0.3, **shared)
    ).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    input_ids = torch.randint(101, (8, 16))
    for step in range(40):
        loss = distillation_loss(student, teacher, input_ids, temperature=2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
