"""From the derivative by logits, piece by piece, to the gradients of the tensors: library matrix products.

Every sum is float32 and is rounded to its tensor's dtype once. What runs over the vocabulary (weight, bias,
lora B) is complete when its block is; hidden states are so too, where a piece holds whole rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.streams import Source

ROWS, COLUMNS, WHOLE = range(3)
Key = tuple[int, int]


class Open(NamedTuple):
    """A float32 sum under way, and where it goes once it is complete."""

    total: Tensor
    goal: Tensor


class Gradients:
    """Gradients of the tensors `wanted`, one for each; a tensor that serves several streams has one sum."""

    def __init__(self, wanted: list[Tensor]) -> None:
        self.wanted = wanted
        self.ids = {id(tensor) for tensor in wanted}
        self.done: dict[Key, Tensor] = {}
        self.sums: dict[Key, Open] = {}
        self.started: set[tuple[Key, int]] = set()
        self.whole_rows = False

    def wants(self, source: Source) -> bool:
        """True where some tensor of `source` asks for a gradient."""
        return id(source.hidden) in self.ids or self.wants_head(source)

    def wants_head(self, source: Source) -> bool:
        parts = (source.weight, source.bias, *(source.lora or ())[:2])
        return any(id(part) in self.ids for part in parts)

    def add(self, source: Source, dz: Tensor, rows: slice, columns: slice, live: Tensor | None) -> None:
        """Adds what `dz`, the derivative by the logits of `rows` and `columns`, gives to each tensor.

        live: the rows that count, [N]: not even a NaN of the others may reach a head. None if no head asks.
        """
        assert source.weight is not None
        hidden = source.hidden[rows]
        if live is not None:
            hidden = hidden.masked_fill(~live[rows, None], 0.0)
        self._product(ROWS, source.hidden, rows, dz, source.weight[columns])
        self._product(COLUMNS, source.weight, columns, dz.T, hidden)
        if source.bias is not None and id(source.bias) in self.ids:
            total, fresh = self._sum(COLUMNS, source.bias, columns)
            part = dz.sum(0, dtype=torch.float32)
            total.copy_(part) if fresh else total.add_(part)
        if source.lora is not None:
            a, b, scale = source.lora
            if id(b) in self.ids:
                low = (hidden.float() @ a.float().T).mul_(scale)
                self._product(COLUMNS, b, columns, dz.T, low)
            d_low = torch.empty(dz.shape[0], a.shape[0], dtype=torch.float32, device=dz.device)
            multiply(d_low, dz, b[columns], fresh=True)
            d_low.mul_(scale)
            self._product(WHOLE, a, slice(None), d_low.T, hidden)
            self._product(ROWS, source.hidden, rows, d_low, a)

    def _product(self, role: int, tensor: Tensor, where: slice, a: Tensor, b: Tensor) -> None:
        if id(tensor) in self.ids:
            total, fresh = self._sum(role, tensor, where)
            multiply(total, a, b, fresh=fresh)

    def _sum(self, role: int, tensor: Tensor, where: slice) -> tuple[Tensor, bool]:
        """(the float32 sum of the entries `where` of a tensor, whether nothing has been written to it)."""
        key = (role, id(tensor))
        if key not in self.done:
            self.done[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        by_piece = role == COLUMNS or (role == ROWS and self.whole_rows)
        if key not in self.sums:
            goal = self.done[key][where] if by_piece else self.done[key]
            total = goal
            if goal.dtype != torch.float32:
                total = torch.empty(goal.shape, dtype=torch.float32, device=goal.device)
            self.sums[key] = Open(total, goal)
        total = self.sums[key].total if by_piece else self.sums[key].total[where]
        start = where.start or 0
        fresh = (key, start) not in self.started
        self.started.add((key, start))
        return total, fresh

    def close(self, role: int) -> None:
        """Ends a chunk of rows, a block of columns, or the whole: its sums are complete."""
        if role == ROWS and not self.whole_rows:
            return
        for key in [key for key in self.sums if key[0] == role]:
            total, goal = self.sums.pop(key)
            if total is not goal:
                goal.copy_(total)

    def results(self) -> list[Tensor]:
        """One gradient for each wanted tensor, in its dtype; 0 for what no piece has reached."""
        self.whole_rows = True
        self.close(ROWS)
        self.close(WHOLE)
        return [self._result(tensor) for tensor in self.wanted]

    def _result(self, tensor: Tensor) -> Tensor:
        keys = [(role, id(tensor)) for role in (ROWS, COLUMNS, WHOLE)]
        found = [self.done[key] for key in keys if key in self.done]
        if not found:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return sum(found[1:], found[0])


def multiply(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out (+)= a·b, summed in float32; where one operand is bf16, the other is rounded to it."""
    if a.dtype != b.dtype:
        dtype = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else torch.float32
        a, b = a.to(dtype), b.to(dtype)
    if a.is_cuda and a.dtype == torch.bfloat16:
        if fresh:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif fresh:
        torch.mm(a.float(), b.float(), out=out)
    else:
        out.addmm_(a.float(), b.float())
