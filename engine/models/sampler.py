"""Drawing actions token by token: prefill once per distinct prompt, then one packed step a token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.engine.models.attention import DecodeCache, Padding, PrefillAttention
from etpo.engine.models.language_model import LanguageModel


@dataclass(frozen=True)
class Sample:
    """One drawn action of L tokens.

    Attributes:
        tokens: int64 [L] on the CPU, the stop token included where it was drawn.
        logprob_mu: float32 [L] on the CPU, log-probability under the sampling distribution (temperature and
            truncation included).
        hidden: [L, D], the policy's hidden state at each token state, in the model's dtype.
    """

    tokens: Tensor
    logprob_mu: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The default draws from the policy itself.

    Attributes:
        temperature: > 0; logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def logprobs(self, logits_BV: Tensor) -> Tensor:
        """float32 log-probabilities [B, V] of the sampling distribution."""
        logits = logits_BV / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = logits.sort(dim=-1, descending=True)
            p = ordered.softmax(-1)
            beyond = (p.cumsum(-1) - p) >= self.top_p
            logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), float("-inf"))
        return logits.log_softmax(-1)


@torch.no_grad()
def sample_actions(
    model: LanguageModel,
    prompts: list[Tensor],
    *,
    max_new_tokens: int,
    stop_token: int,
    generator: torch.Generator,
    sampling: Sampling = Sampling(),
) -> list[Sample]:
    """Draw one action behind each prompt.

    Args:
        model: the policy.
        prompts: B of int64 [≥ 1]; equal prompts are prefilled once.
        max_new_tokens: an action is cut there.
        stop_token: ends an action, and belongs to it.
        generator: on the model's device; decides every draw.

    Returns:
        B samples, in the order of the prompts.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("sample_actions: expected at least one prompt, each of at least one token")
    decoder = (_LeanDecoder if model.is_lean else _PaddedDecoder)(model, prompts, max_new_tokens)
    hidden_BD = decoder.prefill()
    alive = torch.arange(len(prompts), device=model.device)
    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for step in range(max_new_tokens):
        logprobs_BV = sampling.logprobs(model.logits(hidden_BD))
        tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator).squeeze(1)
        drawn.append((alive, tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1), hidden_BD))
        goes_on = (tokens_B != stop_token).nonzero().squeeze(1)
        if len(goes_on) == 0 or step + 1 == max_new_tokens:
            break
        if len(goes_on) < len(alive):
            alive, tokens_B = alive[goes_on], tokens_B[goes_on]
            decoder.keep(goes_on)
        hidden_BD = decoder.step(tokens_B)
    return _by_row(drawn, len(prompts))


def _by_row(drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]], n_rows: int) -> list[Sample]:
    """Regroup what was drawn step by step into one sample a row."""
    row_of = torch.cat([alive for alive, _, _, _ in drawn])
    order = row_of.argsort(stable=True)
    lengths = torch.bincount(row_of, minlength=n_rows).tolist()
    tokens, logprobs, hidden = (torch.cat([d[i] for d in drawn])[order].split(lengths) for i in (1, 2, 3))
    return [Sample(t.cpu(), m.cpu(), h) for t, m, h in zip(tokens, logprobs, hidden, strict=True)]


class _LeanDecoder:
    """Packed prefill of distinct prompts, then steps on a static cache."""

    def __init__(self, model: LanguageModel, prompts: list[Tensor], max_new_tokens: int) -> None:
        distinct: dict[bytes, int] = {}
        prompt_of = [distinct.setdefault(p.numpy().tobytes(), len(distinct)) for p in prompts]
        unique = [prompts[prompt_of.index(i)] for i in range(len(distinct))]
        self.model, self.packed = model, torch.cat(unique).to(model.device)
        self.lengths_P = torch.tensor([len(p) for p in unique])
        self.prompt_of = torch.tensor(prompt_of, device=model.device)
        self.layout = Padding(self.lengths_P, model.device)
        self.cache = DecodeCache(
            self.lengths_P[torch.tensor(prompt_of)], max_new_tokens, model.n_layers, model.device
        )

    def prefill(self) -> Tensor:
        attend = PrefillAttention(self.layout, self.lengths_P, self.prompt_of, self.cache)
        hidden_ND = self.model(self.packed, self.layout.positions_N, attend)
        last_P = (self.lengths_P.cumsum(0) - 1).to(self.model.device)
        return hidden_ND[last_P][self.prompt_of]

    def step(self, tokens_B: Tensor) -> Tensor:
        hidden_BD = self.model(tokens_B, self.cache.next_position_B, self.cache)
        self.cache.advance()
        return hidden_BD

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)


class _PaddedDecoder:
    """transformers' own forward and cache, prompts left-padded; finished rows stay and are ignored."""

    def __init__(self, model: LanguageModel, prompts: list[Tensor], max_new_tokens: int) -> None:
        self.model = model
        width = max(len(p) for p in prompts)
        pad = [torch.cat((p.new_zeros(width - len(p)), p)) for p in prompts]
        self.tokens_BT = torch.stack(pad).to(model.device)
        lengths_B = torch.tensor([len(p) for p in prompts])
        self.is_token_BT = (torch.arange(width) >= (width - lengths_B)[:, None]).to(model.device)
        self.rows = torch.arange(len(prompts), device=model.device)
        self.cache: object = None

    def prefill(self) -> Tensor:
        hidden_BTD, self.cache = self.model.forward_padded(self.tokens_BT, self.is_token_BT)
        return hidden_BTD[:, -1]

    def step(self, tokens_B: Tensor) -> Tensor:
        every_B = torch.zeros(len(self.tokens_BT), dtype=torch.int64, device=tokens_B.device)
        every_B[self.rows] = tokens_B
        grown = self.is_token_BT.new_ones(len(every_B), 1)
        self.is_token_BT = torch.cat((self.is_token_BT, grown), dim=1)
        hidden_BTD, self.cache = self.model.forward_padded(every_B[:, None], self.is_token_BT, self.cache)
        return hidden_BTD[self.rows, -1]

    def keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]
