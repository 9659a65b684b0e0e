"""One LM head seen block by block: how a problem is cut, logits of a tile, and gradients out of a tile.

A block of a head is cast to the dtype of the logits once a call; memory does not grow with the tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.checks import memory_of
from etpo.kernels.chunked import sizes
from etpo.kernels.gradients import Factors, Gradients, Rows, multiply
from etpo.kernels.streams import Problem, Source


class Tiling(NamedTuple):
    """How a sweep over n_rows tokens (all, or those listed in `swept`) is cut."""

    n_rows: int
    n_vocab: int
    chunk: int
    block: int
    swept: Tensor | None

    def blocks(self) -> Iterator[slice]:
        """The vocabulary blocks, which are the outer loop."""
        return (slice(v, min(v + self.block, self.n_vocab)) for v in range(0, self.n_vocab, self.block))

    def chunks(self) -> Iterator[tuple[slice, Rows]]:
        """(place among the tokens swept, rows of the inputs that these are)."""
        for start in range(0, self.n_rows, self.chunk):
            chunk = slice(start, min(start + self.chunk, self.n_rows))
            yield chunk, chunk if self.swept is None else self.swept[chunk]


def place_of(problem: Problem) -> str:
    """The key of a problem's device in the tables of sizes."""
    return "cpu" if problem.device.type == "cpu" else "cuda"


def tiling_of(problem: Problem, active: Tensor | None) -> Tiling:
    """The tiling of `problem` over the rows where `active` [N] is True; None means all."""
    n_rows, n_vocab, place = problem.n_rows, problem.n_vocab, place_of(problem)
    index = None
    if active is not None and not bool(active.all()):
        index = active.nonzero()[:, 0]
        n_rows = index.shape[0]
    # Given logits need no product, and their rows lie whole in memory.
    block = n_vocab if problem.given_logits else min(n_vocab, sizes.BLOCK_COLUMNS[place])
    chunk = max(1, min(n_rows, sizes.TILE_ELEMENTS[place] // block))
    return Tiling(n_rows, n_vocab, chunk, block, index)


# Blocks of heads in the dtype of a product, by memory and dtype.
Casts = dict[tuple[object, torch.dtype], Tensor]


class RowInputs(NamedTuple):
    """What one chunk of tokens feeds a head: hidden [n, D] and, with lora, hidden·Aᵀ [n, R]."""

    hidden: Tensor
    low_rank: Tensor | None


class Head:
    """A source whose logits are asked for tile by tile: `open_block`, then `logits` and `backward` in it."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source = source
        self.dtype = dtype
        self.memory = None if source.weight is None else memory_of(source.weight)
        # Where products of bf16 are summed in float32, bf16 matrices stay as they are.
        low = source.weight is not None and source.weight.dtype == source.hidden.dtype == torch.bfloat16
        self.operand_dtype = torch.bfloat16 if low and source.hidden.is_cuda else dtype
        casts = source.weight is not None and source.weight.dtype != self.operand_dtype
        self.cast_elements = source.weight.numel() if casts and source.weight is not None else 0

    def open_block(self, columns: slice, cache: Casts) -> None:
        """Makes `columns` the vocabulary block. `cache`, one a block, holds casts that heads share."""
        self.columns = columns
        source = self.source
        if source.weight is None:
            return
        key = (self.memory, self.operand_dtype)
        if key not in cache:
            cache[key] = source.weight[columns].to(self.operand_dtype)
        self.weight_block = cache[key]
        if source.bias is not None:
            self.bias_block = source.bias[columns].to(self.dtype)
            # What is masked stays so under a softcap.
            self.is_masked = torch.isneginf(self.bias_block)
        if source.lora is not None:
            self.b_block = source.lora[1][columns].to(self.dtype)

    def read_rows(self, rows: Rows) -> RowInputs:
        """The inputs of the tokens `rows`."""
        if self.source.weight is None:
            return RowInputs(self.source.hidden[rows, self.columns], None)
        hidden = self.source.hidden[rows].to(self.operand_dtype)
        if self.source.lora is None:
            return RowInputs(hidden, None)
        return RowInputs(hidden, hidden.to(self.dtype) @ self.source.lora[0].to(self.dtype).T)

    def logits(self, inputs: RowInputs, out: Tensor) -> Tensor:
        """Logits [n, m] of the open block, written to `out`."""
        source = self.source
        if source.weight is None:
            return torch.mul(inputs.hidden, 1.0 / source.temperature, out=out)
        multiply(out, inputs.hidden, self.weight_block.T, fresh=True)
        if source.lora is not None and inputs.low_rank is not None:
            out.addmm_(inputs.low_rank, self.b_block.T, alpha=source.lora[2])
        if source.bias is not None:
            out.add_(self.bias_block)
        if source.softcap is not None:
            out.mul_(1.0 / source.softcap).tanh_().mul_(source.softcap / source.temperature)
            if source.bias is not None:
                out.masked_fill_(self.is_masked, float("-inf"))
        elif source.temperature != 1.0:
            out.mul_(1.0 / source.temperature)
        return out

    def add_logits(
        self, inputs: RowInputs, share: float, bias_share: float, out: Tensor, columns: slice, *, fresh: bool
    ) -> None:
        """out[:, columns] (+)= (share·products + bias_share·bias) / temperature; no softcap."""
        alpha, part = 1.0 / self.source.temperature, out[:, columns]
        multiply(part, inputs.hidden, self.weight_block[columns].T, fresh=fresh, alpha=share * alpha)
        if self.source.lora is not None and inputs.low_rank is not None:
            part.addmm_(inputs.low_rank, self.b_block[columns].T, alpha=share * alpha * self.source.lora[2])
        if self.source.bias is not None:
            part.add_(self.bias_block[columns], alpha=bias_share * alpha)

    def hidden_gradient(self, dz: Tensor, share: float, out: Tensor) -> None:
        """out [n, D] = share · ∂/∂hidden from dz [n, V], of whole rows; no softcap."""
        alpha = share / self.source.temperature
        multiply(out, dz, self.weight_block, fresh=True, alpha=alpha)
        if self.source.lora is not None:
            a, _, scale = self.source.lora
            d_low = torch.empty(dz.shape[0], a.shape[0], dtype=out.dtype, device=dz.device)
            multiply(d_low, dz, self.b_block, fresh=True)
            multiply(out, d_low, a.to(out.dtype), fresh=False, alpha=alpha * scale)

    def backward(
        self, dz: Tensor, z: Tensor | None, inputs: RowInputs, rows: Rows, sink: Gradients, scratch: Tensor
    ) -> None:
        """Adds to `sink` the gradients of the open block's dz [n, m], which is overwritten.

        z holds the block's logits where the head has a softcap.
        """
        source = self.source
        if source.softcap is not None and z is not None:
            # z = cap·tanh(·)/T, so the slope is (1 − (z·T/cap)²)/T.
            torch.mul(z, source.temperature / source.softcap, out=scratch)
            if source.bias is not None:
                scratch.masked_fill_(self.is_masked, 0.0)
            dz.sub_(scratch.mul_(scratch).mul_(dz))
        if source.temperature != 1.0:
            dz.mul_(1.0 / source.temperature)
        if source.weight is None:
            sink.add_logits(source.hidden, rows, self.columns, dz)
            return
        x = Factors(inputs.hidden, self.weight_block)
        if source.lora is not None:
            x = x._replace(low=inputs.low_rank, a=source.lora[0].to(self.dtype), b=self.b_block)
        sink.add(source, dz, rows, self.columns, x)


def open_heads(problem: Problem, streams: set[int]) -> dict[int, Head]:
    """The heads of `streams`, by stream."""
    return {k: Head(source, problem.dtype) for k, source in problem.streams.items() if k in streams}
