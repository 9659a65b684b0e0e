"""Which packed tokens see each other: the two `Attend` callables of the engine.

`SharedPromptAttention` serves evaluation and the update: every distinct prompt stands once among the packed
tokens, and all the suffixes that follow it attend to its one set of keys and values, so gradients of a shared
prompt add up over its suffixes exactly. `DecodeCache` serves the sampler.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding:
    """Maps packed rows [N, …] of sequences with given lengths to right-padded [S, T, …] and back.

    Args:
        lengths_S: int64 [S] on the CPU, each ≥ 1.
    """

    def __init__(self, lengths_S: Tensor, device: torch.device) -> None:
        self.n_sequences, self.width = len(lengths_S), int(lengths_S.max())
        is_token_ST = torch.arange(self.width) < lengths_S[:, None]
        self.flat_N = is_token_ST.flatten().nonzero().squeeze(1).to(device)
        self.is_token_ST = is_token_ST.to(device)
        self.positions_N = torch.arange(self.width).expand_as(is_token_ST)[is_token_ST].to(device)

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, …] → [S, T, …], zeros on padding."""
        padded = x_N.new_zeros((self.n_sequences * self.width, *x_N.shape[1:]))
        padded = padded.index_copy(0, self.flat_N, x_N)
        return padded.view(self.n_sequences, self.width, *x_N.shape[1:])

    def pack(self, x_ST: Tensor) -> Tensor:
        """[S, T, …] → [N, …]."""
        return x_ST.flatten(0, 1).index_select(0, self.flat_N)


class SharedPromptAttention:
    """Packed prompts [P of them], then packed suffixes [S of them], each suffix behind one prompt.

    Suffixes are padded in blocks of neighbours; put sequences of like length side by side, and little of the
    work falls on padding.

    Args:
        prompt_lengths: int64 [P], each ≥ 0 (zero: an empty shared part).
        suffix_lengths: int64 [S], each ≥ 1.
        prompt_of: int64 [S], the prompt that each suffix continues.
        device: where the index tensors live.

    Attributes:
        positions_N: int64 [N], each token's position in its own sequence; prompts first.
        n_prompt_tokens: how many of the N packed tokens are prompt tokens.
    """

    def __init__(
        self, prompt_lengths: Tensor, suffix_lengths: Tensor, prompt_of: Tensor, device: torch.device
    ) -> None:
        self.n_prompt_tokens = int(prompt_lengths.sum())
        self.prompts = Padding(prompt_lengths, device) if self.n_prompt_tokens else None
        self.blocks: list[_SuffixBlock] = []
        begin = self.n_prompt_tokens
        for lengths, prompts in zip(suffix_lengths.split(BLOCK), prompt_of.split(BLOCK), strict=True):
            self.blocks.append(_SuffixBlock(begin, lengths, prompts, prompt_lengths[prompts], device))
            begin = self.blocks[-1].end
        positions = [self.prompts.positions_N] if self.prompts else []
        self.positions_N = torch.cat(positions + [block.positions_N for block in self.blocks])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.prompts is None:
            return torch.cat([block(q, k, v, None, None) for block in self.blocks])
        n = self.n_prompt_tokens
        q_p, k_p, v_p = (self.prompts.pad(x[:n]).transpose(1, 2) for x in (q, k, v))
        out_p = F.scaled_dot_product_attention(
            q_p, k_p, v_p, is_causal=True, enable_gqa=q_p.shape[1] != k_p.shape[1]
        )
        out_s = [block(q, k, v, k_p, v_p) for block in self.blocks]
        return torch.cat([self.prompts.pack(out_p.transpose(1, 2)), *out_s])


# Suffixes that are padded to one length.
BLOCK = 8


class _SuffixBlock:
    """Some neighbouring suffixes: packed tokens begin … end, behind the prompts `prompt_of`."""

    def __init__(
        self, begin: int, lengths: Tensor, prompt_of: Tensor, prompt_lengths: Tensor, device: torch.device
    ) -> None:
        self.begin, self.end = begin, begin + int(lengths.sum())
        self.prompt_of, self.prompt_width = prompt_of.to(device), int(prompt_lengths.max())
        self.suffixes = Padding(lengths, device)
        self.positions_N = self.suffixes.positions_N + prompt_lengths.repeat_interleave(lengths).to(device)
        width = self.suffixes.width
        sees_prompt = torch.arange(self.prompt_width) < prompt_lengths[:, None]
        sees_own = torch.ones(width, width, dtype=torch.bool).tril()[None].expand(len(lengths), -1, -1)
        sees = torch.cat((sees_prompt[:, None].expand(-1, width, -1), sees_own), dim=-1)
        self.sees = sees[:, None].to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, k_p: Tensor | None, v_p: Tensor | None) -> Tensor:
        """Attention of the block's tokens; k_p, v_p: keys and values [P, G, T, d] of the padded prompts."""
        rows = slice(self.begin, self.end)
        q_s, k_s, v_s = (self.suffixes.pad(x[rows]).transpose(1, 2) for x in (q, k, v))
        if k_p is not None and v_p is not None and self.prompt_width:
            k_s = torch.cat((k_p[:, :, : self.prompt_width].index_select(0, self.prompt_of), k_s), dim=2)
            v_s = torch.cat((v_p[:, :, : self.prompt_width].index_select(0, self.prompt_of), v_s), dim=2)
        out = F.scaled_dot_product_attention(
            q_s, k_s, v_s, self.sees, enable_gqa=q_s.shape[1] != k_s.shape[1]
        )
        return self.suffixes.pack(out.transpose(1, 2))


class DecodeCache:
    """Static key-value buffers for rows that grow by one token a step.

    Prompts are right-aligned, so that every row writes its next token at the same column.

    Args:
        prompt_lengths_B: int64 [B], each ≥ 1, what each row has already.
        new_tokens: how many columns to keep for new tokens.
    """

    def __init__(
        self, prompt_lengths_B: Tensor, new_tokens: int, n_layers: int, device: torch.device
    ) -> None:
        self.column = int(prompt_lengths_B.max())
        self.capacity = self.column + new_tokens
        self.buffers: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * n_layers
        self.next_position_B = prompt_lengths_B.to(device)
        columns = torch.arange(self.capacity, device=device)
        self.is_key_BT = columns >= (self.column - self.next_position_B)[:, None]
        self.has_padding = bool((prompt_lengths_B != self.column).any())

    def fill(self, layer: int, k_PGTd: Tensor, v_PGTd: Tensor, prompt_of: Tensor, lengths_P: Tensor) -> None:
        """Put the keys and values of right-padded prompts before the rows that continue them."""
        columns = torch.arange(self.column, device=k_PGTd.device)
        source_PT = (columns - (self.column - lengths_P.to(columns.device))[:, None]).clamp_min(0)
        index = source_PT[:, None, :, None].expand(-1, k_PGTd.shape[1], -1, k_PGTd.shape[3])
        pair = []
        for x in (k_PGTd, v_PGTd):
            buffer = x.new_zeros((len(prompt_of), x.shape[1], self.capacity, x.shape[3]))
            buffer[:, :, : self.column] = x.gather(2, index).index_select(0, prompt_of)
            pair.append(buffer)
        self.buffers[layer] = (pair[0], pair[1])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.buffers[layer]
        keys[:, :, self.column] = k
        values[:, :, self.column] = v
        end = self.column + 1
        mask = self.is_key_BT[:, None, None, :end] if self.has_padding else None
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys[:, :, :end], values[:, :, :end], mask, enable_gqa=q.shape[1] != keys.shape[1]
        )
        return out[:, :, 0]

    def advance(self) -> None:
        """One token was written in every row."""
        self.column += 1
        self.next_position_B = self.next_position_B + 1

    def keep(self, rows: Tensor) -> None:
        """Drop the rows that are not named: they have finished."""
        self.buffers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.buffers]
        self.next_position_B = self.next_position_B[rows]
        self.is_key_BT = self.is_key_BT[rows]


class PrefillAttention:
    """Causal attention inside each of P packed prompts, filling a `DecodeCache` on the way."""

    def __init__(self, prompts: Padding, lengths_P: Tensor, prompt_of: Tensor, cache: DecodeCache) -> None:
        self.prompts, self.lengths_P, self.prompt_of, self.cache = prompts, lengths_P, prompt_of, cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_p, k_p, v_p = (self.prompts.pad(x).transpose(1, 2) for x in (q, k, v))
        self.cache.fill(layer, k_p, v_p, self.prompt_of, self.lengths_P)
        out = F.scaled_dot_product_attention(
            q_p, k_p, v_p, is_causal=True, enable_gqa=q_p.shape[1] != k_p.shape[1]
        )
        return self.prompts.pack(out.transpose(1, 2))
