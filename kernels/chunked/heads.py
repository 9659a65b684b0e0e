"""One LM head seen block by block: logits of a tile, and gradients out of a tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.streams import Source

Rows = slice | Tensor


def product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, alpha: float = 1.0) -> None:
    """out (+)= alpha·a·b, summed in the dtype of `out` whatever the dtype of a and b."""
    if a.dtype == b.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b, alpha=alpha)
        elif alpha == 1.0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(out, a, b, beta=0.0, alpha=alpha, out=out)
        return
    low = a.dtype if a.element_size() < b.element_size() else b.dtype
    result = torch.mm(a.to(low), b.to(low), out_dtype=out.dtype)
    if accumulate:
        out.add_(result, alpha=alpha)
    else:
        torch.mul(result, alpha, out=out)


def needs_cast(tensor: Tensor, dtype: torch.dtype) -> bool:
    """True where `product` wants `tensor` in `dtype`: not for bf16 where that is summed in float32."""
    return tensor.dtype != dtype and not (tensor.dtype == torch.bfloat16 and tensor.device.type == "cuda")


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as an operand of `product`."""
    return tensor.to(dtype) if needs_cast(tensor, dtype) else tensor


class RowInputs(NamedTuple):
    """What one chunk of tokens feeds a head: hidden [n, D] and, with lora, hidden·Aᵀ [n, R]."""

    hidden: Tensor
    low_rank: Tensor | None


class Head:
    """A source whose logits are asked for tile by tile: `open_block`, then `logits` and `backward` in it."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source = source
        self.dtype = dtype

    def open_block(self, start: int, stop: int, cache: dict[int, Tensor]) -> None:
        """Makes [start, stop) the vocabulary block. `cache`, one a block, holds casts that heads share."""
        self.start, self.stop = start, stop
        source = self.source
        if source.weight is None:
            return
        self.weight_block = self._cast(source.weight, cache)
        if source.bias is not None:
            self.bias_block = source.bias[start:stop].to(self.dtype)
        if source.lora is not None:
            self.b_block = source.lora[1][start:stop].to(self.dtype)

    def _cast(self, weight: Tensor, cache: dict[int, Tensor]) -> Tensor:
        if id(weight) not in cache:
            cache[id(weight)] = operand(weight[self.start : self.stop], self.dtype)
        return cache[id(weight)]

    def read_rows(self, rows: Rows) -> RowInputs:
        """The inputs of the tokens `rows`."""
        if self.source.weight is None:
            return RowInputs(self.source.hidden[rows, self.start : self.stop], None)
        hidden = operand(self.source.hidden[rows], self.dtype)
        if self.source.lora is None:
            return RowInputs(hidden, None)
        return RowInputs(hidden, hidden.to(self.dtype) @ self.source.lora[0].to(self.dtype).T)

    def logits(self, inputs: RowInputs, out: Tensor) -> Tensor:
        """Logits [n, stop − start] of the open block, written to `out`."""
        source = self.source
        if source.weight is None:
            return torch.mul(inputs.hidden, 1.0 / source.temperature, out=out)
        product(out, inputs.hidden, self.weight_block.T, accumulate=False)
        if source.lora is not None and inputs.low_rank is not None:
            out.addmm_(inputs.low_rank, self.b_block.T, alpha=source.lora[2])
        if source.bias is not None:
            out.add_(self.bias_block)
        if source.softcap is not None:
            out.mul_(1.0 / source.softcap).tanh_().mul_(source.softcap / source.temperature)
        elif source.temperature != 1.0:
            out.mul_(1.0 / source.temperature)
        return out

    def add_logits(
        self,
        hidden: Tensor,
        share: float,
        bias_share: float,
        out: Tensor,
        columns: slice,
        *,
        accumulate: bool,
    ) -> None:
        """out[:, columns] (+)= (share·products + bias_share·bias) / temperature; no softcap, no lora."""
        alpha, part = 1.0 / self.source.temperature, out[:, columns]
        product(part, hidden, self.weight_block[columns].T, accumulate=accumulate, alpha=share * alpha)
        if self.source.bias is not None:
            part.add_(self.bias_block[columns], alpha=bias_share * alpha)

    def backward(
        self, dz: Tensor, z: Tensor | None, inputs: RowInputs, rows: Rows, sink: "Gradients", scratch: Tensor
    ) -> None:
        """Adds to `sink` the gradients of the open block's dz [n, stop − start], which is overwritten.

        z holds the block's logits where the head has a softcap.
        """
        source = self.source
        if source.softcap is not None and z is not None:
            # z = cap·tanh(·)/T, so the slope is (1 − (z·T/cap)²)/T.
            torch.mul(z, source.temperature / source.softcap, out=scratch)
            dz.sub_(scratch.mul_(scratch).mul_(dz))
        if source.temperature != 1.0:
            dz.mul_(1.0 / source.temperature)
        if source.weight is None:
            sink.add_logits(source.hidden, rows, self.start, self.stop, dz)
            return
        low = None
        if source.lora is not None and inputs.low_rank is not None:
            a, b, scale = source.lora
            low = torch.mm(dz, self.b_block).mul_(scale)
            sink.add_block(b, self.start, self.stop, dz.T, inputs.low_rank, scale)
            sink.add_whole(a, low.T, inputs.hidden.to(self.dtype))
        if source.bias is not None:
            sink.add_bias(source.bias, self.start, self.stop, dz)
        sink.add_rows(source.hidden, rows, dz, self.weight_block)
        if low is not None and source.lora is not None:
            sink.add_rows(source.hidden, rows, low, source.lora[0].to(self.dtype))
        sink.add_block(source.weight, self.start, self.stop, dz.T, inputs.hidden)


class Gradients:
    """Gradients of the tensors that ask for one, summed in the dtype of the logits, one sum for each tensor.

    A tensor that serves several heads, or one head twice, has one sum. What runs over the vocabulary (weight,
    bias, lora B) is complete when its block is, and is rounded to the tensor's dtype only then.
    """

    def __init__(self, wanted: list[Tensor], dtype: torch.dtype) -> None:
        self.wanted = wanted
        self.dtype = dtype
        self.ids = {id(tensor) for tensor in wanted}
        self.sums: dict[int, Tensor] = {}
        self.blocks: dict[int, Tensor] = {}
        self.rounding: list[tuple[Tensor, Tensor]] = []

    def wants(self, source: Source) -> bool:
        """True where some tensor of `source` asks for a gradient."""
        parts = (source.hidden, source.weight, source.bias, *(source.lora or ())[:2])
        return any(id(part) in self.ids for part in parts)

    def _sum(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if id(tensor) not in self.sums:
            self.sums[id(tensor)] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        return self.sums[id(tensor)]

    def _block(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The sum of rows [start, stop) of a tensor over the vocabulary."""
        if id(tensor) not in self.blocks:
            total = self._sum(tensor, tensor.dtype)[start:stop]
            block = total
            if tensor.dtype != self.dtype:
                block = torch.zeros(total.shape, dtype=self.dtype, device=tensor.device)
                self.rounding.append((total, block))
            self.blocks[id(tensor)] = block
        return self.blocks[id(tensor)]

    def close_block(self) -> None:
        """Ends a vocabulary block: its sums are complete."""
        for total, block in self.rounding:
            total.copy_(block)
        self.rounding.clear()
        self.blocks.clear()

    def add_rows(self, tensor: Tensor, rows: Rows, a: Tensor, b: Tensor) -> None:
        """The rows `rows` of `tensor` += a·b."""
        if id(tensor) not in self.ids:
            return
        total = self._sum(tensor, self.dtype)
        if isinstance(rows, slice):
            product(total[rows], a, b, accumulate=True)
        else:
            part = torch.empty(a.shape[0], b.shape[1], dtype=self.dtype, device=a.device)
            product(part, a, b, accumulate=False)
            total.index_add_(0, rows, part)

    def add_whole(self, tensor: Tensor, a: Tensor, b: Tensor) -> None:
        """`tensor` += a·b."""
        if id(tensor) in self.ids:
            product(self._sum(tensor, self.dtype), a, b, accumulate=True)

    def add_block(
        self, tensor: Tensor, start: int, stop: int, a: Tensor, b: Tensor, alpha: float = 1.0
    ) -> None:
        """The vocabulary rows [start, stop) of `tensor` += alpha·a·b."""
        if id(tensor) in self.ids:
            product(self._block(tensor, start, stop), a, b, accumulate=True, alpha=alpha)

    def add_bias(self, tensor: Tensor, start: int, stop: int, dz: Tensor) -> None:
        """The entries [start, stop) of `tensor` += dz summed over tokens."""
        if id(tensor) in self.ids:
            self._block(tensor, start, stop).add_(dz.sum(0))

    def add_logits(self, tensor: Tensor, rows: Rows, start: int, stop: int, dz: Tensor) -> None:
        """The tile [rows, start:stop) of given logits += dz."""
        if id(tensor) not in self.ids:
            return
        columns = self._sum(tensor, tensor.dtype)[:, start:stop]
        if isinstance(rows, slice):
            columns[rows].add_(dz)
        else:
            columns.index_add_(0, rows, dz.to(tensor.dtype))

    def results(self) -> list[Tensor]:
        """One gradient for each wanted tensor, in its dtype."""
        return [self._sum(tensor, tensor.dtype).to(tensor.dtype) for tensor in self.wanted]


class InPlaceGradients(Gradients):
    """Gradients of given logits, written over the logits; each tile of them is read before it is written."""

    def add_logits(self, tensor: Tensor, rows: Rows, start: int, stop: int, dz: Tensor) -> None:
        if id(tensor) not in self.ids:
            return
        if isinstance(rows, slice):
            tensor[rows, start:stop].copy_(dz)
        else:
            tensor[:, start:stop].index_copy_(0, rows, dz.to(tensor.dtype))
