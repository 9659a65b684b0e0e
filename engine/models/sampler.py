"""Drawing actions token by token, behind prompts of any lengths."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.engine.models.decoders import decoder_of
from etpo.engine.models.finite import check_logprobs
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
    stop_token: int | Collection[int],
    generator: torch.Generator,
    sampling: Sampling = Sampling(),
) -> list[Sample]:
    """Draw one action behind each prompt.

    Args:
        model: the policy.
        prompts: B of int64 [≥ 1]; a lean model prefills equal prompts once.
        max_new_tokens: an action is cut there.
        stop_token: ends an action, and belongs to it; or several tokens, of which the first drawn does.
        generator: on the model's device; decides every draw.

    Returns:
        B samples, in the order of the prompts.

    Raises:
        Diverged: the model's logits are not finite.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("sample_actions: expected at least one prompt, each of at least one token")
    stops = [stop_token] if isinstance(stop_token, int) else sorted(stop_token)
    stops_S = torch.tensor(stops, dtype=torch.int64, device=model.device)
    if model.decoding != "alike":
        return _draw(model, prompts, max_new_tokens, stops_S, generator, sampling)
    samples: list[Sample | None] = [None] * len(prompts)
    for length in dict.fromkeys(map(len, prompts)):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        drawn = _draw(model, [prompts[row] for row in rows], max_new_tokens, stops_S, generator, sampling)
        for row, sample in zip(rows, drawn, strict=True):
            samples[row] = sample
    return [sample for sample in samples if sample is not None]


def _draw(
    model: LanguageModel,
    prompts: list[Tensor],
    max_new_tokens: int,
    stops_S: Tensor,
    generator: torch.Generator,
    sampling: Sampling,
) -> list[Sample]:
    decoder = decoder_of(model, prompts, max_new_tokens)
    hidden_BD = decoder.prefill()
    alive = torch.arange(len(prompts), device=model.device)
    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for step in range(max_new_tokens):
        logprobs_BV = sampling.logprobs(model.logits(hidden_BD))
        check_logprobs(logprobs_BV)
        tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator).squeeze(1)
        drawn.append((alive, tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1), hidden_BD))
        goes_on = (~torch.isin(tokens_B, stops_S)).nonzero().squeeze(1)
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
