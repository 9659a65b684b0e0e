"""From cotangents of statistics to gradients of tensors: what a backward must make, and the sums it makes.

Every sum has the dtype of the logits and is rounded to its tensor's dtype once. What runs over the
vocabulary (weight, bias, lora B) is complete when its block is; hidden states are so too, where a piece holds
whole rows.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.plan import AT, E_PR, E_PU, E_Q, LSE, LSE_U, READS, THROUGH_P, P, Q, R, U
from etpo.kernels.streams import Problem, Source

Rows = slice | Tensor
Key = tuple[int, int]

# The parts that a tensor can play in a stream.
HIDDEN, WEIGHT, BIAS, LORA_A, LORA_B = range(5)
OVER_VOCABULARY = (WEIGHT, BIAS, LORA_B)


def planes_of(problem: Problem, fields: Iterable[int]) -> set[int]:
    """The planes of logits that the statistics `fields` read; u stands on those of its streams."""
    planes: set[int] = set().union(*(READS[k] for k in fields))
    return planes | problem.mixed if U in planes else planes


class Plan(NamedTuple):
    """A backward: the streams that get a gradient, the planes it takes, and whether softmax p, softmax u."""

    grads: set[int]
    planes: set[int]
    prob: bool
    prob_u: bool


def plan_backward(problem: Problem, active: set[int], wanted: set[int]) -> Plan:
    """The work for cotangents on the statistics `active` where the streams `wanted` ask for a gradient."""
    through_p = {k: THROUGH_P[k] | ({E_PU} if k in problem.mixed else set()) for k in (P, Q, R)}
    through_u = {k: {LSE_U} if k in problem.mixed else set() for k in (P, Q, R)}
    grads = {k for k in wanted if active & (through_p[k] | through_u[k] | {LSE[k], AT[k]})}
    prob = any(active & through_p[k] for k in grads)
    prob_u = any(active & through_u[k] for k in grads)
    planes = {P} if prob else set()
    if P in grads:
        planes |= {k for k, field in ((Q, E_Q), (R, E_PR)) if field in active}
    if prob_u or (P in grads and E_PU in active):
        planes |= {U} | problem.mixed
    for k in grads:
        if problem.streams[k].softcap is not None or (k != P and LSE[k] in active):
            planes.add(k)
    return Plan(grads, planes, prob, prob_u)


class Factors(NamedTuple):
    """What a piece of the derivative by products, [n tokens, m entries], is multiplied with.

    hidden [n, D], weight [m, D]; with a low-rank change low = hidden·Aᵀ [n, R] (None unless B asks for a
    gradient), A [R, D] and B [m, R].
    """

    hidden: Tensor
    weight: Tensor
    low: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


class Open(NamedTuple):
    """A sum under way, and where it goes once it is complete."""

    total: Tensor
    goal: Tensor


class Gradients:
    """Gradients of the tensors `wanted`: one sum for each part that a tensor plays, whatever the streams.

    in_place: the gradients of given logits are written over the logits.
    """

    def __init__(
        self,
        wanted: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        whole_rows: bool = False,
        in_place: bool = False,
    ) -> None:
        self.wanted = wanted
        self.dtype = dtype
        self.whole_rows = whole_rows
        self.in_place = in_place
        self.ids = {id(tensor) for tensor in wanted}
        self.goals: dict[Key, Tensor] = {}
        self.open: dict[Key, Open] = {}
        self.started: set[tuple[Key, int]] = set()

    def ask(self, *tensors: Tensor | None) -> bool:
        """True where one of `tensors` asks for a gradient."""
        return any(id(tensor) in self.ids for tensor in tensors)

    def streams_of(self, problem: Problem) -> set[int]:
        """The streams that ask for a gradient."""
        return {k for k, s in problem.streams.items() if self.ask(s.hidden) or self.heads_ask([s])}

    def heads_ask(self, sources: Iterable[Source]) -> bool:
        """True where some tensor of a head asks for a gradient."""
        return any(self.ask(s.weight, s.bias, *(s.lora[:2] if s.lora else ())) for s in sources)

    def add(self, source: Source, dz: Tensor, rows: Rows, columns: slice, x: Factors) -> None:
        """Adds what `dz`, the derivative by the products of `rows` and `columns`, gives to each tensor."""
        self._add_product(HIDDEN, source.hidden, rows, dz, x.weight)
        self._add_product(WEIGHT, source.weight, columns, dz.T, x.hidden)
        if source.bias is not None and self.ask(source.bias):
            total, fresh = self._sum(BIAS, source.bias, columns)
            part = dz.sum(0, dtype=self.dtype)
            total.copy_(part) if fresh else total.add_(part)
        if source.lora is None or x.a is None or x.b is None:
            return
        a, b, scale = source.lora
        if x.low is not None:
            self._add_product(LORA_B, b, columns, dz.T, x.low, scale)
        if self.ask(a, source.hidden):
            d_low = torch.empty(dz.shape[0], x.a.shape[0], dtype=self.dtype, device=dz.device)
            multiply(d_low, dz, x.b, fresh=True)
            d_low.mul_(scale)
            self._add_product(LORA_A, a, slice(None), d_low.T, x.hidden)
            self._add_product(HIDDEN, source.hidden, rows, d_low, x.a)

    def _add_product(
        self, part: int, tensor: Tensor | None, where: Rows, a: Tensor, b: Tensor, alpha: float = 1.0
    ) -> None:
        if tensor is None or id(tensor) not in self.ids:
            return
        total, fresh = self._sum(part, tensor, where)
        if isinstance(where, slice):
            multiply(total, a, b, fresh=fresh, alpha=alpha)
            return
        product = torch.empty(a.shape[0], b.shape[1], dtype=self.dtype, device=a.device)
        multiply(product, a, b, fresh=True, alpha=alpha)
        total.index_add_(0, where, product)

    def _sum(self, part: int, tensor: Tensor, where: Rows) -> tuple[Tensor, bool]:
        """(the sum of the entries `where`, or of all where they are listed; whether it is still empty)."""
        key = (part, id(tensor))
        by_piece = part in OVER_VOCABULARY or (part == HIDDEN and self.whole_rows)
        if key not in self.goals:
            self.goals[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if key not in self.open:
            goal = self.goals[key][where] if by_piece else self.goals[key]
            total = goal
            if goal.dtype != self.dtype:
                total = torch.empty(goal.shape, dtype=self.dtype, device=goal.device)
            self.open[key] = Open(total, goal)
            if not isinstance(where, slice):
                total.zero_()
        total = self.open[key].total
        if not isinstance(where, slice):
            return total, False
        start = (key, where.start or 0)
        fresh = start not in self.started
        self.started.add(start)
        return (total if by_piece else total[where]), fresh

    def add_logits(self, tensor: Tensor, rows: Rows, columns: slice, dz: Tensor) -> None:
        """The tile [rows, columns] of given logits += dz, in their dtype."""
        key = (HIDDEN, id(tensor))
        if id(tensor) not in self.ids:
            return
        if key not in self.goals and not self.in_place:
            self.goals[key] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        tile = (tensor if self.in_place else self.goals[key])[:, columns]
        if isinstance(rows, slice):
            tile[rows].copy_(dz) if self.in_place else tile[rows].add_(dz)
        elif self.in_place:
            tile.index_copy_(0, rows, dz.to(tensor.dtype))
        else:
            tile.index_add_(0, rows, dz.to(tensor.dtype))

    def close_rows(self) -> None:
        """Ends a chunk of tokens. Where it held whole rows, sums of hidden states are complete."""
        if self.whole_rows:
            self._close(HIDDEN)

    def close_blocks(self) -> None:
        """Ends a block of the vocabulary: sums over it are complete."""
        self._close(*OVER_VOCABULARY)

    def _close(self, *parts: int) -> None:
        for key in [key for key in self.open if key[0] in parts]:
            total, goal = self.open.pop(key)
            if total is not goal:
                goal.copy_(total)

    def results(self) -> list[Tensor]:
        """One gradient for each wanted tensor, in its dtype; 0 for what no piece has reached."""
        self._close(HIDDEN, LORA_A, *OVER_VOCABULARY)
        return collect(self.wanted, [(key[1], goal) for key, goal in self.goals.items()])


def collect(wanted: Sequence[Tensor], sums: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """The gradient of each wanted tensor from sums by the id of a tensor, one for each part that it plays."""
    gradients = []
    for tensor in wanted:
        found = [total for owner, total in sums if owner == id(tensor)]
        if not found:
            found = [torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)]
        gradients.append(sum(found[1:], found[0]))
    return gradients


def multiply(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool, alpha: float = 1.0) -> None:
    """out (+)= alpha·a·b, summed in the dtype of `out`; beside a bf16 operand the other is rounded to it."""
    if a.dtype != b.dtype and torch.bfloat16 in (a.dtype, b.dtype):
        a, b = a.bfloat16(), b.bfloat16()
    if not (a.is_cuda and a.dtype == torch.bfloat16 and b.dtype == torch.bfloat16):
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=0.0 if fresh else 1.0, alpha=alpha, out=out)
    elif fresh:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if alpha != 1.0:
            out.mul_(alpha)
    elif alpha == 1.0:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=alpha)


def weighted_sum(out: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """out = Σ tile · coefficient[:, None] over the (tile [n, m], coefficient [n]) of `terms`."""
    for k, (tile, coefficient) in enumerate(terms):
        column = coefficient.to(out.dtype)[:, None]
        if k == 0:
            torch.mul(tile, column, out=out)
        else:
            out.addcmul_(tile, column)
    return out if terms else out.zero_()
