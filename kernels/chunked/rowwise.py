"""Functions of one number a token, over whole rows at a time: the derivative is made in the forward sweep.

With one number a token, a cotangent only scales a token's derivative. So the forward sweep leaves either the
derivative by the hidden states (frozen heads), or, where they are few, the derivative by the logits; backward
scales it row by row, and recomputes nothing. Of a weighted sum over the tokens it leaves the gradients
themselves. Logits come from library products, a chunk of tokens at a time; the arithmetic on their rows is
PyTorch's, below, or one Triton kernel (`etpo.kernels.triton.rows`).
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.checks import has_memory, problem_of
from etpo.kernels.chunked import sizes
from etpo.kernels.chunked.heads import Casts, Head, open_heads, place_of, tiling_of
from etpo.kernels.gradients import Gradients, collect, weighted_sum
from etpo.kernels.operators import Cotangents, Rule, expect_gradient, flatten, head_tensors, make_operator
from etpo.kernels.plan import P, Q, R
from etpo.kernels.streams import Problem

# KL(p ‖ u) = E_p[p − u] − lse p + lse u, of planes p and u; lse u − lse r, of planes r and u; log p(w), of p.
KINDS = ("kl", "log_ratio", "logprob")
KL, LOG_RATIO, LOGPROB = range(len(KINDS))
# What the forward sweep leaves for backward: ∂/∂hidden of each stream, ∂/∂(plane of logits), or the gradients
# of a weighted sum.
BY_HIDDEN, BY_LOGITS, FINISHED = range(3)
# Whose arithmetic takes the rows.
PYTORCH, TRITON = range(2)


class Part(NamedTuple):
    """The derivative by the logits of a stream: share · ∂/∂(plane)."""

    stream: int
    share: float
    plane: int


def parts_of(problem: Problem, kind: int) -> list[Part]:
    """How the derivatives by the planes give those by the streams.

    Planes: of KL p and u, of LOG_RATIO r and u, where what r does through u stands in the plane of r already,
    of LOGPROB p alone.
    """
    a, b = problem.mix
    if kind == LOGPROB:
        return [Part(P, 1.0, 0)]
    others = [Part(R, a, 1), Part(Q, b, 1)] if kind == KL else [Part(Q, b, 1)]
    return [Part(P if kind == KL else R, 1.0, 0), *(part for part in others if part.share != 0)]


class Task(NamedTuple):
    """What is asked of the operator: a kind of number, derivatives of `mode`, and whose arithmetic.

    asking: the streams that ask for a gradient, or, of FINISHED, the places of the tensors that do.
    """

    kind: int
    mode: int
    arithmetic: int
    asking: list[int]

    def planes(self, problem: Problem) -> list[int]:
        """The planes whose derivative some stream asks for; `asking` names streams."""
        return sorted({part.plane for part in parts_of(problem, self.kind) if part.stream in self.asking})

    def names(self, problem: Problem) -> list[int]:
        """The streams, or the planes, of the derivatives, in the order in which they are passed on."""
        return self.asking if self.mode == BY_HIDDEN else self.planes(problem)

    def numbers(self) -> list[int]:
        """The task as whole numbers, which an operator passes on."""
        return [self.kind, self.mode, self.arithmetic, *self.asking]


def read_task(task: Sequence[int]) -> Task:
    """The inverse of `Task.numbers`."""
    return Task(task[0], task[1], task[2], list(task[3:]))


def number(problem: Problem, kind: int, arithmetic: int = PYTORCH) -> list[Tensor] | None:
    """The number of each row, [N] float64, of a problem with weights their weighted sum, [1].

    Of LOGPROB the entropy follows, which has no gradient. None where the sweep in blocks is the better way.
    """
    sources = problem.streams.values()
    tensors, *_ = flatten(problem)
    capped = any(source.softcap is not None for source in sources)
    # Whole rows read whole heads, so a cast of the heads must be small enough to hold.
    heads = open_heads(problem, {P, Q, R}).values()
    n_cast = sum({head.memory: head.cast_elements for head in heads}.values())
    fits = n_cast * problem.dtype.itemsize <= sizes.KEEP_BYTES[place_of(problem)]
    if problem.given_logits or capped or not fits or not expect_gradient(*tensors):
        return None
    if problem.targets is None:
        return _number(problem, kind, arithmetic)
    if torch.compiler.is_compiling() or not has_memory(problem.targets):
        return None
    # Masked rows are left out from the start.
    real = (problem.targets != problem.ignore_index).nonzero()[:, 0]
    tokens = problem.targets[real] if kind == LOGPROB else None
    if real.shape[0] == problem.n_rows:
        return _number(problem._replace(targets=tokens), kind, arithmetic)
    few = {k: s._replace(hidden=s.hidden.index_select(0, real)) for k, s in problem.streams.items()}
    weights = None if problem.weights is None else problem.weights[real]
    made = _number(problem_of(few, tokens, problem.mix, problem.ignore_index, weights), kind, arithmetic)
    if made is None or weights is not None:
        return made
    return [x.new_zeros(problem.n_rows).index_copy(0, real, x) for x in made]


def _number(problem: Problem, kind: int, arithmetic: int) -> list[Tensor] | None:
    n_numbers = 2 if kind == LOGPROB else 1
    if problem.weights is not None:
        tensors, *_ = flatten(problem)
        places = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        return OPERATOR(problem, Task(kind, FINISHED, arithmetic, places).numbers(), 1)[:n_numbers]
    sources = problem.streams.items()
    asking = [k for k, source in sources if expect_gradient(source.hidden, *head_tensors(source))]
    task = Task(kind, BY_HIDDEN, arithmetic, asking)
    itemsize = problem.dtype.itemsize
    n_bytes = sum(problem.streams[k].hidden.numel() for k in asking) * itemsize
    budget = sizes.HIDDEN_BYTES
    if expect_gradient(*(t for _, source in sources for t in head_tensors(source))):
        task = task._replace(mode=BY_LOGITS)
        n_bytes = (len(task.planes(problem)) + 1) * problem.n_rows * problem.n_vocab * itemsize
        budget = sizes.KEEP_BYTES[place_of(problem)]
    return None if n_bytes > budget else OPERATOR(problem, task.numbers(), 1)[:n_numbers]


def empty(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The numbers, [N] float64 (of a weighted sum [1]), and what `task` leaves beside them; no values."""
    asked = read_task(task)
    hidden = next(iter(problem.streams.values())).hidden
    if asked.mode == FINISHED:
        tensors, *_ = flatten(problem)
        finished = [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in asked.asking]
        return [hidden.new_empty(1, dtype=torch.float64), *finished]
    widths = [problem.n_vocab for _ in asked.names(problem)]
    if asked.mode == BY_HIDDEN:
        widths = [problem.streams[k].hidden.shape[1] for k in asked.asking]
    derivatives = [hidden.new_empty((problem.n_rows, width), dtype=problem.dtype) for width in widths]
    n_numbers = 2 if asked.kind == LOGPROB else 1
    numbers = [hidden.new_empty(problem.n_rows, dtype=torch.float64) for _ in range(n_numbers)]
    return [*numbers, *derivatives]


def forward(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The numbers and what `task` leaves beside them. Heads have no softcap."""
    asked = read_task(task)
    if asked.mode == FINISHED:
        return _finished(problem, asked)
    made = empty(problem, task)
    n_names = len(asked.names(problem))
    numbers = made[: len(made) - n_names]
    named = dict(zip(asked.names(problem), made[len(numbers) :], strict=True))
    by_hidden, by_logits = (named if asked.mode == mode else {} for mode in (BY_HIDDEN, BY_LOGITS))
    walk = Walk(problem, asked, asked.planes(problem))
    for rows, planes in walk.chunks(numbers, by_logits):
        for part in walk.parts:
            if part.stream in by_hidden:
                walk.heads[part.stream].hidden_gradient(
                    planes[part.plane], part.share, by_hidden[part.stream][rows]
                )
    return made


def _finished(problem: Problem, asked: Task) -> list[Tensor]:
    """Σ weight · number [1], and its gradients by the tensors that ask."""
    tensors, *_ = flatten(problem)
    sink = Gradients([tensors[i] for i in asked.asking], problem.dtype)
    streams = sink.streams_of(problem)
    own = [part for part in parts_of(problem, asked.kind) if part.stream in streams]
    walk = Walk(problem, asked, sorted({part.plane for part in own}))
    spare = walk.room(1, walk.chunk)[0] if any(part.plane for part in own) else None
    numbers = torch.empty(problem.n_rows, dtype=torch.float64, device=problem.device)
    assert problem.weights is not None
    for rows, planes in walk.chunks([numbers], {}):
        for part in own:
            dz = planes[part.plane]
            if spare is not None:
                dz = torch.mul(dz, part.share, out=spare[: rows.stop - rows.start])
            head = walk.heads[part.stream]
            head.backward(dz, None, head.read_rows(rows), rows, sink, dz)
    return [(problem.weights.double() * numbers).sum(0, keepdim=True), *sink.results()]


class Wanted(NamedTuple):
    """A number of rows of logits, by its kind, and the derivatives that take the place of the planes.

    by_u: whether the derivative by the second plane is wanted too; share: ∂u/∂r of a LOG_RATIO, of which the
    derivative by the first plane is the whole derivative by r.
    """

    kind: int
    by_u: bool
    share: float


class Given(NamedTuple):
    """What rows have beside their logits: the w of a LOGPROB [n] int64; weights [n] of their derivatives.

    Both may be None. A number that is infinite has a weight of 0.
    """

    tokens: Tensor | None
    weights: Tensor | None


class Numbers(NamedTuple):
    """Where the numbers of the rows go, [n] float64; of a LOGPROB the entropy too, without a derivative."""

    value: Tensor
    entropy: Tensor | None


class Walk:
    """The token chunks of a problem, each with its numbers and the derivatives by the planes `wanted`."""

    def __init__(self, problem: Problem, asked: Task, wanted: list[int]) -> None:
        self.problem, self.asked = problem, asked
        self.wanted = Wanted(asked.kind, 1 in wanted, problem.mix[0])
        self.parts = parts_of(problem, asked.kind)
        self.n_planes = 1 if asked.kind == LOGPROB else 2
        self.heads = open_block(problem, slice(0, problem.n_vocab))
        self.place = place_of(problem)
        self.chunk = chunk_rows(problem.n_rows, problem.n_vocab, problem.dtype.itemsize, self.place)
        self.step = min(self.chunk, max(4, sizes.TILE_ELEMENTS[self.place] // 2 // problem.n_vocab))

    def room(self, n: int, n_rows: int) -> Tensor:
        """Room for n planes of n_rows."""
        return torch.empty(
            n, n_rows, self.problem.n_vocab, dtype=self.problem.dtype, device=self.problem.device
        )

    def chunks(self, numbers: list[Tensor], kept: dict[int, Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, derivatives by the planes), with the rows' numbers written; planes in `kept` stay."""
        spare = self.room(self.n_planes, self.chunk)
        # The softmaxes of both planes share one tile.
        scratch = self.room(2, self.step if self.asked.arithmetic == PYTORCH else 0)
        is_low = all(self.heads[part.stream].operand_dtype == torch.bfloat16 for part in self.parts)
        low = torch.empty_like(spare, dtype=torch.bfloat16) if is_low else None
        for start in range(0, self.problem.n_rows, self.chunk):
            rows = slice(start, min(start + self.chunk, self.problem.n_rows))
            planes = [
                kept[i][rows] if i in kept else spare[i, : rows.stop - start] for i in range(self.n_planes)
            ]
            for i, plane in enumerate(planes):
                _fill(plane, self.heads, self._logits_of(i), rows, self.place)
            if self.asked.kind == LOG_RATIO and self.problem.mix[0] != 0:
                # r has been multiplied already.
                planes[1].add_(planes[0], alpha=self.problem.mix[0])
            targets, weights = self.problem.targets, self.problem.weights
            given = Given(
                None if targets is None else targets[rows], None if weights is None else weights[rows]
            )
            out = Numbers(numbers[0][rows], numbers[1][rows] if len(numbers) > 1 else None)
            if self.asked.arithmetic == TRITON:
                # What stays, stays in float32; what meets bf16 matrices alone is rounded as it is written.
                places = planes if low is None or kept else [plane[: rows.stop - start] for plane in low]
                import_module("etpo.kernels.triton.rows").derive_rows(self.wanted, planes, given, out, places)
                yield rows, places
            else:
                derive_rows(self.wanted, planes, given, out, scratch)
                yield rows, planes

    def _logits_of(self, plane: int) -> list[Part]:
        """The streams whose products a plane is mixed of."""
        return [part for part in self.parts if part.plane == plane]


def chunk_rows(n_rows: int, n_vocab: int, itemsize: int, place: str) -> int:
    """Tokens of a chunk: chunks of about one size, as few as the workspace and its share allow."""
    most = max(1, min(n_rows, sizes.CHUNK_ROWS, sizes.PLANE_ELEMENTS[place] // n_vocab))
    small = 2 * n_rows * n_vocab * itemsize <= sizes.KEEP_BYTES[place]
    n_chunks = max(1 if small else sizes.FEWEST_CHUNKS, -(-n_rows // most))
    return max(1, min(most, -(-n_rows // (n_chunks * sizes.ROW_GROUP)) * sizes.ROW_GROUP))


def open_block(problem: Problem, columns: slice) -> dict[int, Head]:
    """The heads of `problem` by stream, with the block `columns` open."""
    heads = open_heads(problem, {P, Q, R})
    casts: Casts = {}
    for head in heads.values():
        head.open_block(columns, casts)
    return heads


def _fill(plane: Tensor, heads: dict[int, Head], parts: list[Part], rows: slice, place: str) -> None:
    """plane = Σ share · logits over `parts`, in one product where their heads are the same."""
    terms = [(heads[part.stream], heads[part.stream].read_rows(rows), part.share) for part in parts]
    bias_shares = [part.share for part in parts]
    if len(terms) == 2 and _same_head(terms[0][0], terms[1][0]):
        (head, one, share), (_, other, other_share) = terms
        mixed = one.hidden * share + other.hidden * other_share
        terms, bias_shares = [(head, one._replace(hidden=mixed), 1.0)], [share + other_share]
    n_vocab = plane.shape[1]
    # A CPU multiplies few rows faster by blocks of the head that stay in its cache.
    width = sizes.BLOCK_COLUMNS[place] if place == "cpu" else n_vocab
    for start in range(0, n_vocab, width):
        columns = slice(start, min(start + width, n_vocab))
        for k, (head, inputs, share) in enumerate(terms):
            head.add_logits(inputs, share, bias_shares[k], plane, columns, fresh=k == 0)


def _same_head(one: Head, other: Head) -> bool:
    """True where both heads are one linear map of the hidden states, taken in the dtype of the logits."""
    a, b = one.source, other.source
    same = one.memory == other.memory and a.bias is b.bias and a.temperature == b.temperature
    plain = a.lora is None and b.lora is None
    return same and plain and one.operand_dtype == other.operand_dtype == one.dtype


def backward(problem: Problem, task: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for, from the derivatives that `forward` left."""
    asked = read_task(task)
    g = cotangents.g[0]
    if asked.mode == FINISHED:
        tensors, *_ = flatten(problem)
        finished = {id(tensors[i]): x for i, x in zip(asked.asking, cotangents.made[1:], strict=True)}
        return [finished[id(x)] * g.to(x.dtype) for x in cotangents.wanted]
    names = asked.names(problem)
    named = dict(zip(names, cotangents.made[len(cotangents.made) - len(names) :], strict=True))
    if asked.mode == BY_LOGITS:
        return _from_logits(problem, asked, g, named, cotangents.wanted)
    column = g[:, None].to(problem.dtype)
    sums = []
    for k, derivative in named.items():
        hidden = problem.streams[k].hidden
        # A token without a cotangent may hold an infinity.
        scaled = (derivative * column).masked_fill_(column == 0, 0.0)
        sums.append((id(hidden), scaled.to(hidden.dtype)))
    return collect(cotangents.wanted, sums)


def _from_logits(
    problem: Problem, asked: Task, g: Tensor, by_logits: dict[int, Tensor], wanted: list[Tensor]
) -> list[Tensor]:
    tiling = tiling_of(problem, g != 0)
    sink = Gradients(wanted, problem.dtype)
    parts = [part for part in parts_of(problem, asked.kind) if part.plane in by_logits]
    spare = torch.empty(2, tiling.chunk * tiling.block, dtype=problem.dtype, device=g.device)
    for columns in tiling.blocks():
        heads = open_block(problem, columns)
        for chunk, rows in tiling.chunks():
            shape = (chunk.stop - chunk.start, columns.stop - columns.start)
            dz, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in spare)
            for k in sink.streams_of(problem):
                own = [part for part in parts if part.stream == k]
                terms = [(by_logits[part.plane][rows, columns], part.share * g[rows]) for part in own]
                weighted_sum(dz, terms)
                heads[k].backward(dz, None, heads[k].read_rows(rows), rows, sink, scratch)
        sink.close_blocks()
    return sink.results()


def derive_rows(wanted: Wanted, planes: list[Tensor], given: Given, out: Numbers, scratch: Tensor) -> None:
    """Writes the numbers of the rows `planes`, [n, V] each, and over the planes their derivatives.

    scratch: [2, m, V] of the dtype of the planes; m rows go at a time, and should fit in a cache.
    """
    step = scratch.shape[1]
    for first in range(0, planes[0].shape[0], step):
        rows = slice(first, min(first + step, planes[0].shape[0]))
        one, prob = planes[0][rows], scratch[0, : rows.stop - first]
        if wanted.kind == LOGPROB:
            assert given.tokens is not None
            assert out.entropy is not None
            out.value[rows], out.entropy[rows] = _logprob(one, prob, given.tokens[rows])
        elif wanted.kind == KL:
            u = planes[1][rows]
            out.value[rows] = _kl(one, u, prob, scratch[1, : u.shape[0]], by_u=wanted.by_u)
        else:
            out.value[rows] = _log_ratio(one, planes[1][rows], prob, wanted.share)
        if given.weights is not None:
            live = ~torch.isinf(out.value[rows])
            share = torch.where(live, given.weights[rows], 0.0).to(prob.dtype)[:, None]
            for plane in planes[: 1 + wanted.by_u]:
                part = plane[rows].mul_(share)
                if not bool(live.all()):
                    part.masked_fill_(~live[:, None], 0.0)


def _kl(p: Tensor, u: Tensor, prob: Tensor, prob_u: Tensor, *, by_u: bool) -> Tensor:
    """KL(softmax p ‖ softmax u); leaves ∂KL/∂p in `p` and, where by_u, ∂KL/∂u in `u`."""
    lse_p, lse_u = softmax_into(prob, p), softmax_into(prob_u, u)
    level = (lse_p - lse_u).to(p.dtype).nan_to_num(0.0, 0.0, 0.0)
    p.sub_(u).sub_(level[:, None])
    mean = torch.mul(p, prob, out=u).sum(1)
    if not is_finite(mean):
        p.masked_fill_(prob == 0, 0.0)
        mean = torch.mul(p, prob, out=u).sum(1)
    p.sub_(mean[:, None]).mul_(prob)
    if by_u:
        torch.sub(prob_u, prob, out=u)
    return mean.double() + (level.double() - lse_p + lse_u)


def _log_ratio(r: Tensor, u: Tensor, prob: Tensor, share: float) -> Tensor:
    """lse u − lse r; leaves share·softmax u − softmax r in `r` and softmax u in `u`."""
    lse_r = softmax_into(prob, r)
    torch.neg(prob, out=r)
    lse_u = softmax_into(prob, u)
    u.copy_(prob)
    r.add_(prob, alpha=share)
    return lse_u - lse_r


def _logprob(p: Tensor, prob: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(w), entropy of p); leaves one-hot(w) − softmax p in `p`."""
    lse = softmax_into(prob, p)
    at = p.gather(1, tokens[:, None])[:, 0].double()
    p.sub_(lse.to(p.dtype).nan_to_num(0.0, 0.0, 0.0)[:, None])
    mean = p.mul_(prob).sum(1)
    if not is_finite(mean):
        mean = p.masked_fill_(prob == 0, 0.0).sum(1)
    torch.neg(prob, out=p)
    p.scatter_add_(1, tokens[:, None], torch.ones_like(p[:, :1]))
    rest = lse.to(p.dtype).double() - lse
    return at - lse, -(mean.double() + rest)


def softmax_into(out: Tensor, z: Tensor) -> Tensor:
    """Writes softmax(z) over the tile's columns to `out`; returns log-sum-exp in float64, [n].

    The largest probability is exp(0)/Σ, so the sum needs no pass of its own. A row of −inf alone gives −inf,
    and NaN for probabilities.
    """
    top = z.amax(1)
    torch.softmax(z, 1, out=out)
    lse = top.double() - out.amax(1).double().log()
    return lse.masked_fill_(torch.isneginf(top), float("-inf"))


def is_finite(values: Tensor) -> bool:
    """True where no value is infinite or NaN; one reduction."""
    return bool(torch.isfinite(values.sum()))


OPERATOR = make_operator("rowwise", Rule(forward, empty, backward))
