"""How the next hidden states come about while actions are drawn: a prefill, then one step a token.

`LeanDecoder` packs and shares prompts; `PaddedDecoder` runs transformers' forward and cache on left-padded
rows; `WholeDecoder` runs rows anew for each token, for models without a cache that can be gone on with.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from etpo.engine.models.attention import DecodeCache, Padding, PrefillAttention

if TYPE_CHECKING:
    from etpo.engine.models.language_model import LanguageModel


class Decoder(Protocol):
    """Rows that grow by one token a step."""

    def prefill(self) -> Tensor:
        """[B, D], the hidden states from which the first tokens are drawn."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """[B, D] behind one more token in each row that is still kept."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop the rows that are not named: they have finished."""
        ...


def decoder_of(model: "LanguageModel", prompts: list[Tensor], max_new_tokens: int) -> Decoder:
    """The decoder that suits a model.

    Args:
        prompts: B of int64 [≥ 1]; all of one length where `model.decoding` is `alike`.
        max_new_tokens: most steps.
    """
    if model.decoding == "lean":
        return LeanDecoder(model, prompts, max_new_tokens)
    return WholeDecoder(model, prompts) if model.decoding == "whole" else PaddedDecoder(model, prompts)


class LeanDecoder:
    """Packed prefill of distinct prompts, then steps on a static cache."""

    def __init__(self, model: "LanguageModel", prompts: list[Tensor], max_new_tokens: int) -> None:
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
        hidden_ND: Tensor = self.model(self.packed, self.layout.positions_N, attend)
        last_P = (self.lengths_P.cumsum(0) - 1).to(self.model.device)
        return hidden_ND[last_P][self.prompt_of]

    def step(self, tokens_B: Tensor) -> Tensor:
        hidden_BD: Tensor = self.model(tokens_B, self.cache.next_position_B, self.cache)
        self.cache.advance()
        return hidden_BD

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)


class PaddedDecoder:
    """transformers' own forward and cache, prompts left-padded; finished rows stay and are ignored."""

    def __init__(self, model: "LanguageModel", prompts: list[Tensor]) -> None:
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


class WholeDecoder:
    """transformers' own forward over right-padded rows, all of it again for every token."""

    def __init__(self, model: "LanguageModel", prompts: list[Tensor]) -> None:
        self.model, self.texts = model, [p.to(model.device) for p in prompts]

    def prefill(self) -> Tensor:
        tokens_BT = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True)
        lengths_B = torch.tensor([len(text) for text in self.texts], device=tokens_BT.device)
        is_token_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
        hidden_BTD, _ = self.model.forward_padded(tokens_BT, is_token_BT)
        return hidden_BTD[torch.arange(len(lengths_B), device=tokens_BT.device), lengths_B - 1]

    def step(self, tokens_B: Tensor) -> Tensor:
        self.texts = [torch.cat(pair) for pair in zip(self.texts, tokens_B.split(1), strict=True)]
        return self.prefill()

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]
