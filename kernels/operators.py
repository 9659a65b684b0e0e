"""One maker of custom operators: a problem goes in, per-token numbers come out.

An operator is differentiable once and opaque to torch.compile; it takes tensors, whole numbers and floats.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from etpo.kernels.checks import no_autocast, problem_of
from etpo.kernels.streams import Problem, Source

# Tensors of a source, in the order of a layout: hidden, weight, bias, lora A, lora B.
N_PARTS = 5
NO_TENSOR = -1


class Cotangents(NamedTuple):
    """What a backward starts from.

    g: the cotangents of the results that have one, by index; made: all that forward returned; wanted: the
    tensors that ask for a gradient; in_place: given logits may be overwritten with theirs.
    """

    g: dict[int, Tensor]
    made: list[Tensor]
    wanted: list[Tensor]
    in_place: bool


class Rule(NamedTuple):
    """What an operator does with a problem; `task` are whole numbers, one at least, that say what is asked.

    forward: the results, then whatever else backward is to find again; empty: the same without values;
    backward: one gradient for each wanted tensor.
    """

    forward: Callable[[Problem, Sequence[int]], list[Tensor]]
    empty: Callable[[Problem, Sequence[int]], list[Tensor]]
    backward: Callable[[Problem, Sequence[int], Cotangents], list[Tensor]]


class Operator(NamedTuple):
    """The custom operators of a rule, forward and backward."""

    forward: Any
    backward: Any

    def __call__(
        self, problem: Problem, task: Sequence[int], n_results: int, *, in_place: bool = False
    ) -> list[Tensor]:
        """All that the rule's forward returns; its first n_results are differentiable in every tensor."""
        tensors, layout, scales = flatten(problem)
        return list(
            self.forward(
                tensors, problem.targets, problem.weights, layout, scales, list(task), n_results, in_place
            )
        )


def make_operator(name: str, rule: Rule) -> Operator:
    """Registers etpo::name and etpo::name_backward, which do what `rule` says."""

    @torch.library.custom_op(f"etpo::{name}", mutates_args=())
    def forward(
        tensors: Sequence[Tensor], targets: Tensor | None, weights: Tensor | None, layout: Sequence[int],
        scales: Sequence[float], task: Sequence[int], n_results: int, in_place: bool,
    ) -> list[Tensor]:  # fmt: skip
        problem = unflatten(tensors, targets, weights, layout, scales)
        with no_autocast(problem.device):
            return rule.forward(problem, task)

    @forward.register_fake
    def _(
        tensors: Sequence[Tensor], targets: Tensor | None, weights: Tensor | None, layout: Sequence[int],
        scales: Sequence[float], task: Sequence[int], n_results: int, in_place: bool,
    ) -> list[Tensor]:  # fmt: skip
        return rule.empty(unflatten(tensors, targets, weights, layout, scales), task)

    @torch.library.custom_op(f"etpo::{name}_backward", mutates_args=())
    def backward(
        g: Sequence[Tensor], active: Sequence[int], made: Sequence[Tensor], tensors: Sequence[Tensor],
        targets: Tensor | None, weights: Tensor | None, layout: Sequence[int], scales: Sequence[float],
        task: Sequence[int], wanted: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        problem = unflatten(tensors, targets, weights, layout, scales)
        given = dict(zip(active, g, strict=True))
        with no_autocast(problem.device):
            asked = [tensors[i] for i in wanted]
            return rule.backward(problem, task, Cotangents(given, list(made), asked, False))

    @backward.register_fake
    def _(
        g: Sequence[Tensor], active: Sequence[int], made: Sequence[Tensor], tensors: Sequence[Tensor],
        targets: Tensor | None, weights: Tensor | None, layout: Sequence[int], scales: Sequence[float],
        task: Sequence[int], wanted: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        return [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in wanted]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, targets, weights, *ctx.static, n_results, ctx.in_place = inputs
        ctx.n_tensors = len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[n_results:])
        ctx.save_for_backward(targets, weights, *tensors, *output)

    def differentiate(ctx: Any, g: Sequence[Tensor | None] | None) -> tuple[Any, ...]:
        given = {k: x for k, x in enumerate(g or ()) if x is not None}
        ask = ctx.needs_input_grad[0]
        wanted = [i for i, needed in enumerate(ask) if needed]
        gradients: list[Tensor] = []
        if given:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "etpo.kernels: only backend='reference' has second derivatives (create_graph)"
                )
            layout, scales, task = ctx.static
            targets, weights, *saved = ctx.saved_tensors
            tensors, made = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
            if ctx.in_place:
                asked = [tensors[i] for i in wanted]
                problem = unflatten(tensors, targets, weights, layout, scales)
                rule.backward(problem, task, Cotangents(given, made, asked, True))
                gradients = [logits.detach() for logits in asked]
            else:
                parts = list(given.values()), list(given), made, tensors
                gradients = backward(*parts, targets, weights, layout, scales, task, wanted)
        found = dict(zip(wanted, gradients, strict=False))
        return [found.get(i) for i in range(len(ask))], None, None, None, None, None, None, None

    forward.register_autograd(differentiate, setup_context=setup)
    return Operator(forward, backward)


def flatten(problem: Problem) -> tuple[list[Tensor], list[int], list[float]]:
    """The distinct tensors of `problem` but for targets and weights, and two lists of numbers.

    layout: for each stream and part an index into the tensors, then the ignore index; scales: for each stream
    temperature, softcap (0 for none) and lora scale, then the mix. A tensor that stands in two places is
    listed once, so that it is read once and gets one gradient. Raises RuntimeError for tensors with tangents,
    which an operator would drop without a word.
    """
    tensors: list[Tensor] = []
    layout: list[int] = []
    scales: list[float] = []
    for source in problem.sources:
        if source is None:
            layout += [NO_TENSOR] * N_PARTS
            scales += [1.0, 0.0, 1.0]
            continue
        a, b, scale = source.lora if source.lora is not None else (None, None, 1.0)
        for tensor in (source.hidden, source.weight, source.bias, a, b):
            layout.append(_index_of(tensor, tensors))
        scales += [source.temperature, source.softcap or 0.0, scale]
    if not torch.compiler.is_compiling() and any(_tangent(x) is not None for x in tensors):
        raise RuntimeError("etpo.kernels: only backend='reference' has forward-mode derivatives")
    return tensors, [*layout, problem.ignore_index], [*scales, *problem.mix]


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = unpack_dual(tensor).tangent
    return tangent


def _index_of(tensor: Tensor | None, tensors: list[Tensor]) -> int:
    if tensor is None:
        return NO_TENSOR
    for k, known in enumerate(tensors):
        if known is tensor:
            return k
    tensors.append(tensor)
    return len(tensors) - 1


def unflatten(
    tensors: Sequence[Tensor],
    targets: Tensor | None,
    weights: Tensor | None,
    layout: Sequence[int],
    scales: Sequence[float],
) -> Problem:
    """The inverse of `flatten`."""
    sources: dict[int, Source] = {}
    for k in range(3):
        parts = layout[N_PARTS * k : N_PARTS * (k + 1)]
        hidden, weight, bias, a, b = (None if i == NO_TENSOR else tensors[i] for i in parts)
        temperature, softcap, scale = scales[3 * k : 3 * k + 3]
        if hidden is not None:
            lora = None if a is None or b is None else (a, b, scale)
            sources[k] = Source(hidden, weight, bias, lora, temperature, softcap or None)
    return problem_of(sources, targets, (scales[-2], scales[-1]), layout[-1], weights)


def head_tensors(source: Source) -> list[Tensor]:
    """The tensors of a source but for its hidden states."""
    parts = (source.weight, source.bias, *(source.lora or ())[:2])
    return [part for part in parts if isinstance(part, Tensor)]


def expect_gradient(*tensors: Tensor) -> bool:
    """True where a backward may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
