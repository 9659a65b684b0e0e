"""PPO in plain PyTorch with the exact KL to the reference over the vocabulary, in place of an estimate.

    loss = mean over actions of −min(r·A, clip(r, 1 − ε, 1 + ε)·A) + c_kl·KL(π ‖ π̄) − c_entropy·H(π)

Run it: `python examples/ppo.py` teaches a tiny random model to prefer even tokens in seconds.
"""

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from etpo.kernels import linear_kl, linear_logprob
from etpo.kernels.causal_lm import head_of, heads_of, stream_of


def ppo_loss(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    input_ids: Tensor,
    is_action: Tensor,
    logprob_old: Tensor,
    advantage: Tensor,
    *,
    clip: float = 0.2,
    kl_coef: float = 0.05,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, mean exact KL in nats), scalars.

    input_ids [B, T]; is_action [B, T − 1] is True where the token at t + 1 was sampled; logprob_old and
    advantage [B, T − 1] belong to that token.
    """
    with torch.no_grad():
        base = stream_of(reference, input_ids=input_ids)
    own = stream_of(policy, input_ids=input_ids)
    targets = input_ids[:, 1:].masked_fill(~is_action, -100)
    hidden, ref_hidden = own.hidden[:, :-1], base.hidden[:, :-1]
    logprob, entropy = linear_logprob(hidden, own.weight, targets, **head_of(own))
    kl = linear_kl(
        hidden[is_action], own.weight, ref_hidden[is_action], base.weight.detach(), **heads_of(own, base)
    )  # fmt: skip
    ratio = (logprob - logprob_old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    objective = gain[is_action] - kl_coef * kl + entropy_coef * entropy[is_action]
    return -objective.mean(), kl.mean().detach()


@torch.no_grad()
def sample(policy: PreTrainedModel, prompts: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], log-probabilities [B, n_new] of the new tokens)."""
    ids, logprobs = prompts, []
    for _ in range(n_new):
        log_p = policy(input_ids=ids).logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1)
        logprobs.append(log_p.gather(1, token))
        ids = torch.cat([ids, token], 1)
    return ids, torch.cat(logprobs, 1)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    n_prompt, n_new = 4, 8
    prompts = torch.randint(30, (32, n_prompt))
    is_action = (torch.arange(n_prompt + n_new - 1) >= n_prompt - 1).expand(32, -1)
    for iteration in range(10):
        ids, new_logprobs = sample(policy, prompts, n_new)
        reward = (ids[:, n_prompt:] % 2 == 0).float()
        logprob_old = torch.zeros(is_action.shape)
        advantage = torch.zeros(is_action.shape)
        logprob_old[:, n_prompt - 1 :] = new_logprobs
        advantage[:, n_prompt - 1 :] = (reward - reward.mean()) / (reward.std() + 1e-6)
        for _ in range(4):
            loss, kl = ppo_loss(policy, reference, ids, is_action, logprob_old, advantage)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if iteration % 3 == 0:
            print(f"iteration {iteration}  even tokens {reward.mean():.2f}  KL {kl:.3f}")


if __name__ == "__main__":
    main()
