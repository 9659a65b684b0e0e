"""Hidden states of many suffixes that follow few distinct prompts: each prompt is run once."""

import torch
from torch import Tensor

from etpo.engine.models.attention import SharedPromptAttention
from etpo.engine.models.language_model import LanguageModel


class Sequences:
    """The layout of one forward: distinct prompts, and the suffixes behind them.

    Args:
        prompts: one int64 [P_i ≥ 0] a sequence; equal prompts are found and run once.
        suffixes: one int64 [L_i ≥ 1] a sequence.
    """

    def __init__(self, prompts: list[Tensor], suffixes: list[Tensor]) -> None:
        distinct: dict[bytes, int] = {}
        unique: list[Tensor] = []
        prompt_of = []
        for prompt in prompts:
            key = prompt.numpy().tobytes()
            if key not in distinct:
                distinct[key] = len(unique)
                unique.append(prompt)
            prompt_of.append(distinct[key])
        self.prompts, self.suffixes, self.prompt_of = unique, suffixes, prompt_of
        # Neighbours of like length share their padding.
        self._by_length = sorted(range(len(suffixes)), key=lambda i: (len(prompts[i]), len(suffixes[i])))
        self._layouts: dict[torch.device, tuple[Tensor, SharedPromptAttention, Tensor]] = {}

    def hidden(self, model: LanguageModel) -> Tensor:
        """Last hidden states of all suffix tokens, packed [ΣL, D], in the order of the suffixes."""
        return self._lean(model) if model.is_lean else self._padded(model)

    def _lean(self, model: LanguageModel) -> Tensor:
        device = model.device
        if device not in self._layouts:
            suffixes = [self.suffixes[i] for i in self._by_length]
            attend = SharedPromptAttention(
                torch.tensor([len(p) for p in self.prompts]),
                torch.tensor([len(s) for s in suffixes]),
                torch.tensor([self.prompt_of[i] for i in self._by_length]),
                device,
            )
            rows = torch.arange(sum(len(s) for s in suffixes)).split([len(s) for s in suffixes])
            row_of = dict(zip(self._by_length, rows, strict=True))
            order = torch.cat([row_of[i] for i in range(len(rows))]) + attend.n_prompt_tokens
            self._layouts[device] = torch.cat(self.prompts + suffixes).to(device), attend, order.to(device)
        tokens_N, attend, order = self._layouts[device]
        hidden: Tensor = model(tokens_N, attend.positions_N, attend)
        return hidden.index_select(0, order)

    def _padded(self, model: LanguageModel) -> Tensor:
        rows = [torch.cat((self.prompts[p], s)) for p, s in zip(self.prompt_of, self.suffixes, strict=True)]
        tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths_B = torch.tensor([len(row) for row in rows])
        columns = torch.arange(tokens_BT.shape[1])
        is_token_BT = columns < lengths_B[:, None]
        suffix_B = torch.tensor([len(s) for s in self.suffixes])
        is_suffix_BT = is_token_BT & (columns >= (lengths_B - suffix_B)[:, None])
        hidden_BTD, _ = model.forward_padded(tokens_BT, is_token_BT.to(model.device))
        return hidden_BTD[is_suffix_BT.to(model.device)]
