"""Functions of one number a token, over whole rows at a time: the derivative is made in the forward sweep.

With one number a token, a cotangent only scales a token's derivative. So the forward sweep leaves either the
derivative by the hidden states (frozen heads), or, where they are few, the derivative by the logits; backward
scales it row by row, and recomputes nothing. Of a weighted sum over the tokens it leaves the gradients
themselves.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.kernels.checks import has_memory, problem_of
from etpo.kernels.chunked import sizes
from etpo.kernels.chunked.heads import Casts, Head, open_heads, place_of, tiling_of
from etpo.kernels.gradients import Gradients, collect, multiply, weighted_sum
from etpo.kernels.operators import Cotangents, Rule, expect_gradient, flatten, head_tensors, make_operator
from etpo.kernels.plan import P, Q, R
from etpo.kernels.streams import Problem

KL, LOG_RATIO = range(2)
# What the forward sweep leaves for backward: ∂/∂hidden of each stream, ∂/∂(plane of logits), or the gradients
# of a weighted sum.
BY_HIDDEN, BY_LOGITS, FINISHED = range(3)


class Part(NamedTuple):
    """A derivative by the logits of a stream: share · ∂/∂(plane)."""

    stream: int
    share: float
    plane: int


def parts_of(problem: Problem, kind: int) -> list[Part]:
    """How the derivatives by the planes give those by the streams. Planes: 0 p or r, 1 u.

    KL(p ‖ u) has planes p and u; lse_u − lse_r has planes r and u.
    """
    a, b = problem.mix
    shared = [Part(R, a, 1), Part(Q, b, 1)]
    return [Part(P if kind == KL else R, 1.0, 0), *(part for part in shared if part.share != 0)]


class Task(NamedTuple):
    """What is asked of the operator: a kind of number, and derivatives of `mode`.

    asking: the streams that ask for a gradient, or, of FINISHED, the places of the tensors that do.
    """

    kind: int
    mode: int
    asking: list[int]

    def names(self, problem: Problem) -> list[int]:
        """The streams, or the planes, of the derivatives, in the order in which they are passed on."""
        if self.mode == BY_HIDDEN:
            return self.asking
        return sorted({part.plane for part in parts_of(problem, self.kind) if part.stream in self.asking})


def read_task(task: Sequence[int]) -> Task:
    """`task` as the operator passes it on."""
    return Task(task[0], task[1], list(task[2:]))


def number(problem: Problem, kind: int) -> Tensor | None:
    """KL(p ‖ softmax u), or lse u − lse r, [N] float64; of a problem with weights their weighted sum.

    None where the sweep in blocks is the better way.
    """
    sources = problem.streams.values()
    tensors, *_ = flatten(problem)
    plain = all(source.softcap is None and source.lora is None for source in sources)
    # Whole rows read whole heads, so a cast of the heads must be small enough to hold.
    heads = open_heads(problem, {P, Q, R}).values()
    n_cast = sum({head.memory: head.cast_elements for head in heads}.values())
    fits = n_cast * problem.dtype.itemsize <= sizes.KEEP_BYTES
    if problem.given_logits or not plain or not fits or not expect_gradient(*tensors):
        return None
    if problem.targets is None:
        return _number(problem, kind, tensors)
    if torch.compiler.is_compiling() or not has_memory(problem.targets):
        return None
    # Masked rows are left out from the start.
    real = (problem.targets != problem.ignore_index).nonzero()[:, 0]
    if real.shape[0] == problem.n_rows:
        return _number(problem._replace(targets=None), kind, tensors)
    few = {k: s._replace(hidden=s.hidden.index_select(0, real)) for k, s in problem.streams.items()}
    weights = None if problem.weights is None else problem.weights[real]
    part = problem_of(few, None, problem.mix, problem.ignore_index, weights)
    value = _number(part, kind, flatten(part)[0])
    if value is None or weights is not None:
        return value
    return value.new_zeros(problem.n_rows).index_copy(0, real, value)


def _number(problem: Problem, kind: int, tensors: list[Tensor]) -> Tensor | None:
    if problem.weights is not None:
        places = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        return OPERATOR(problem, [kind, FINISHED, *places], 1)[0]
    sources = problem.streams.items()
    asking = [k for k, source in sources if expect_gradient(source.hidden, *head_tensors(source))]
    task = Task(kind, BY_HIDDEN, asking)
    if expect_gradient(*(t for _, source in sources for t in head_tensors(source))):
        task = Task(kind, BY_LOGITS, asking)
        n_logits = (len(task.names(problem)) + 1) * problem.n_rows * problem.n_vocab
        if n_logits * problem.dtype.itemsize > sizes.KEEP_BYTES:
            return None
    return OPERATOR(problem, [kind, task.mode, *asking], 1)[0]


def empty(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The number, [N] float64 (of a weighted sum [1]), and what `task` leaves beside it, without values."""
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
    return [hidden.new_empty(problem.n_rows, dtype=torch.float64), *derivatives]


def forward(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    """The number and what `task` leaves beside it. Heads have no softcap and no lora."""
    asked = read_task(task)
    if asked.mode == FINISHED:
        return _finished(problem, asked)
    numbers, *derivatives = made = empty(problem, task)
    named = dict(zip(asked.names(problem), derivatives, strict=True))
    by_hidden, by_logits = (named if asked.mode == mode else {} for mode in (BY_HIDDEN, BY_LOGITS))
    mixed = {part.stream for part in parts_of(problem, asked.kind) if part.plane == 1}
    walk = Walk(problem, asked.kind, want_u=1 in by_logits or not mixed.isdisjoint(by_hidden))
    for rows, planes in walk.chunks(numbers, by_logits):
        for k, grad in by_hidden.items():
            for i, part in enumerate(part for part in walk.parts if part.stream == k):
                alpha = part.share / walk.heads[k].source.temperature
                weight = walk.heads[k].weight_block
                multiply(grad[rows], planes[part.plane], weight, fresh=i == 0, alpha=alpha)
    return made


def _finished(problem: Problem, asked: Task) -> list[Tensor]:
    """Σ weight · number [1], and its gradients by the tensors that ask."""
    tensors, *_ = flatten(problem)
    sink = Gradients([tensors[i] for i in asked.asking], problem.dtype)
    streams = sorted(sink.streams_of(problem))
    walk = Walk(problem, asked.kind, want_u=True)
    (room,) = walk.planes(1, walk.chunk)
    numbers = torch.empty(problem.n_rows, dtype=torch.float64, device=problem.device)
    assert problem.weights is not None
    weights = problem.weights.double()
    for rows, planes in walk.chunks(numbers, {}):
        dz = room[: rows.stop - rows.start]
        # A token whose number is infinite gives no gradient.
        dead = torch.isinf(numbers[rows])
        share = weights[rows].masked_fill(dead, 0.0)
        if bool(dead.any()):
            for plane in planes:
                plane.masked_fill_(dead[:, None], 0.0)
        for k in streams:
            own = [part for part in walk.parts if part.stream == k]
            weighted_sum(dz, [(planes[part.plane], part.share * share) for part in own])
            walk.heads[k].backward(dz, None, walk.heads[k].read_rows(rows), rows, sink, dz)
    return [(weights * numbers).sum(0, keepdim=True), *sink.results()]


class Walk:
    """The token chunks of a problem, each with its number and the derivatives by its planes."""

    def __init__(self, problem: Problem, kind: int, *, want_u: bool) -> None:
        self.problem, self.kind, self.want_u = problem, kind, want_u
        self.parts = parts_of(problem, kind)
        self.heads = open_block(problem, slice(0, problem.n_vocab))
        self.place = place_of(problem)
        self.chunk = chunk_rows(problem.n_rows, problem.n_vocab, problem.dtype.itemsize, self.place)
        self.step = min(self.chunk, max(4, sizes.TILE_ELEMENTS[self.place] // 2 // problem.n_vocab))

    def planes(self, n: int, n_rows: int) -> Tensor:
        """Room for n planes of n_rows."""
        return torch.empty(
            n, n_rows, self.problem.n_vocab, dtype=self.problem.dtype, device=self.problem.device
        )

    def chunks(self, numbers: Tensor, kept: dict[int, Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, derivatives by the two planes), with the rows' numbers written; planes in `kept` stay."""
        # The softmaxes of p and of u share one tile.
        spare, scratch = self.planes(2, self.chunk), self.planes(2, self.step)
        for start in range(0, self.problem.n_rows, self.chunk):
            rows = slice(start, min(start + self.chunk, self.problem.n_rows))
            planes = [kept[i][rows] if i in kept else spare[i, : rows.stop - start] for i in range(2)]
            for i, plane in enumerate(planes):
                own = [part for part in self.parts if part.plane == i]
                _fill(plane, self.heads, own, rows, self.place)
            for first in range(0, rows.stop - start, self.step):
                one, u = planes[0][first : first + self.step], planes[1][first : first + self.step]
                prob, prob_u = scratch[0, : u.shape[0]], scratch[1, : u.shape[0]]
                if self.kind == KL:
                    value = kl_rows(one, u, prob, prob_u, want_u=self.want_u)
                else:
                    value = log_ratio_rows(one, u, prob)
                numbers[start + first : start + first + u.shape[0]] = value
            yield rows, planes


def chunk_rows(n_rows: int, n_vocab: int, itemsize: int, place: str) -> int:
    """Tokens of a chunk: chunks of about one size, as few as the workspace and its share allow."""
    most = max(1, min(n_rows, sizes.CHUNK_ROWS, sizes.PLANE_ELEMENTS[place] // n_vocab))
    small = 2 * n_rows * n_vocab * itemsize <= sizes.KEEP_BYTES
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
    terms = [
        (heads[part.stream], heads[part.stream].read_rows(rows).hidden, part.share, part.share)
        for part in parts
    ]
    if len(terms) == 2 and _same_head(terms[0][0], terms[1][0]):
        (head, hidden, share, _), (_, other_hidden, other_share, _) = terms
        terms = [(head, hidden * share + other_hidden * other_share, 1.0, share + other_share)]
    n_vocab = plane.shape[1]
    # A CPU multiplies few rows faster by blocks of the head that stay in its cache.
    width = sizes.BLOCK_COLUMNS[place] if place == "cpu" else n_vocab
    for start in range(0, n_vocab, width):
        columns = slice(start, min(start + width, n_vocab))
        for k, (head, hidden, share, bias_share) in enumerate(terms):
            head.add_logits(hidden, share, bias_share, plane, columns, fresh=k == 0)


def _same_head(one: Head, other: Head) -> bool:
    """True where both heads are one linear map of the hidden states, taken in the dtype of the logits."""
    a, b = one.source, other.source
    same = one.memory == other.memory and a.bias is b.bias and a.temperature == b.temperature
    return same and one.operand_dtype == other.operand_dtype == one.dtype


def backward(problem: Problem, task: Sequence[int], cotangents: Cotangents) -> list[Tensor]:
    """The gradients that are asked for, from the derivatives that `forward` left."""
    asked = read_task(task)
    g, (_, *derivatives) = cotangents.g[0], cotangents.made
    if asked.mode == FINISHED:
        tensors, *_ = flatten(problem)
        finished = {id(tensors[i]): x for i, x in zip(asked.asking, derivatives, strict=True)}
        return [finished[id(x)] * g.to(x.dtype) for x in cotangents.wanted]
    named = dict(zip(asked.names(problem), derivatives, strict=True))
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


def kl_rows(p: Tensor, u: Tensor, prob: Tensor, prob_u: Tensor, *, want_u: bool) -> Tensor:
    """KL(softmax p ‖ softmax u) of whole rows [n, V], [n] float64.

    Leaves ∂KL/∂p in `p` and, where want_u, ∂KL/∂u in `u`; prob and prob_u are scratch.
    """
    lse_p, lse_u = softmax_into(prob, p), softmax_into(prob_u, u)
    level = (lse_p - lse_u).to(p.dtype).nan_to_num(0.0, 0.0, 0.0)
    p.sub_(u).sub_(level[:, None])
    mean = torch.mul(p, prob, out=u).sum(1)
    if not is_finite(mean):
        p.masked_fill_(prob == 0, 0.0)
        mean = torch.mul(p, prob, out=u).sum(1)
    p.sub_(mean[:, None]).mul_(prob)
    if want_u:
        torch.sub(prob_u, prob, out=u)
    return mean.double() + (level.double() - lse_p + lse_u)


def log_ratio_rows(r: Tensor, u: Tensor, prob: Tensor) -> Tensor:
    """lse u − lse r of whole rows [n, V], [n] float64. Leaves its derivatives in `r` and `u`."""
    lse_r = softmax_into(prob, r)
    torch.neg(prob, out=r)
    lse_u = softmax_into(prob, u)
    u.copy_(prob)
    return lse_u - lse_r


OPERATOR = make_operator("rowwise", Rule(forward, empty, backward))
