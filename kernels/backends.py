"""Which backend runs a problem, and what a backend is."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from etpo.kernels import reference
from etpo.kernels.chunked import gather, rowwise, sweep
from etpo.kernels.chunked.rowwise import KL, LOG_RATIO, LOGPROB
from etpo.kernels.operators import Rule, expect_gradient, head_tensors, make_operator
from etpo.kernels.plan import INDEX
from etpo.kernels.shards import fields_to_merge, merge_shards
from etpo.kernels.streams import Problem
from etpo.kernels.triton import measured, sizes

BACKENDS = ("auto", "reference", "chunked", "triton")


class SweepFunction(Protocol):
    """The named statistics, each [N]. in_place: backward may overwrite given logits with their gradient."""

    def __call__(
        self, problem: Problem, fields: tuple[str, ...], *, in_place: bool = False
    ) -> list[Tensor]: ...


class Backend(NamedTuple):
    """Per-token numbers of a problem, [N] each, differentiable; float64, or the dtype of the results.

    sweep: the named statistics; gather: z_q at the targets; number: one number a token (see `rowwise`) with
    its derivative made in the forward sweep, None where the sweep of statistics is the better way.
    """

    sweep: SweepFunction
    gather: Callable[[Problem], Tensor]
    number: Callable[[Problem, int], list[Tensor] | None] | None = None

    def statistics(
        self, problem: Problem, fields: tuple[str, ...], *, in_place: bool = False
    ) -> list[Tensor]:
        """The named statistics of the whole vocabulary, each [N]; merged over the ranks that share it."""
        if problem.shard is None:
            return self.sweep(problem, fields, in_place=in_place)
        names = fields_to_merge(fields)
        local = dict(zip(names, self.sweep(problem, names), strict=True))
        merged = merge_shards(local, problem.shard)
        if problem.targets is None:
            return [merged[name] for name in fields]
        ignored = problem.targets == problem.ignore_index
        return [merged[name].masked_fill(ignored, 0.0) for name in fields]

    def kl(self, problem: Problem, *, in_place: bool = False) -> Tensor:
        """KL(softmax z_p ‖ softmax u) = E_p[z_p − u] − lse_p + lse_u; where it is infinite, no gradient.

        [N], or [1], their sum, where the problem has weights.
        """
        made = self._derived(problem, KL)
        if made is None:
            lse_p, lse_u, e_pu = self.statistics(problem, ("lse_p", "lse_u", "e_pu"), in_place=in_place)
            made = [_weigh(e_pu - lse_p + lse_u, problem)]
        value = made[0]
        if problem.weights is not None:
            return value
        return torch.where(torch.isinf(value), value.detach(), value)

    def log_ratio(self, problem: Problem, *, in_place: bool = False) -> Tensor:
        """lse u − lse z_r, [N], or [1], their sum, where the problem has weights."""
        made = self._derived(problem, LOG_RATIO)
        if made is not None:
            return made[0]
        lse_r, lse_u = self.statistics(problem, ("lse_r", "lse_u"), in_place=in_place)
        return _weigh(lse_u - lse_r, problem)

    def logprob(
        self, problem: Problem, *, entropy_gradient: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(log π(w), entropy) of one target a row, [N] each; the second may lack a gradient."""
        made = None if entropy_gradient else self._derived(problem, LOGPROB)
        if made is not None:
            return made[0], made[1]
        lse_p, e_pp, at_p = self.statistics(problem, ("lse_p", "e_pp", "at_p"), in_place=in_place)
        return at_p - lse_p, -e_pp if entropy_gradient else -e_pp.detach()

    def _derived(self, problem: Problem, kind: int) -> list[Tensor] | None:
        return None if self.number is None or problem.shard else self.number(problem, kind)


def _weigh(values: Tensor, problem: Problem) -> Tensor:
    """Σ weight · value [1] where the problem has weights; what is infinite gives no gradient."""
    if problem.weights is None:
        return values
    values = torch.where(torch.isinf(values), values.detach(), values)
    return (problem.weights * values).sum(0, keepdim=True)


def _at_first_use(module: str, name: str) -> Callable[..., Any]:
    """A function of the folder triton, imported at its first call, so that `import etpo.kernels` is light."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"etpo.kernels.triton.{module}"), name)(*args)

    return call


def _empty_statistics(problem: Problem, task: Sequence[int]) -> list[Tensor]:
    hidden = next(iter(problem.streams.values())).hidden
    return [hidden.new_empty(problem.n_rows, dtype=torch.float64) for _ in task]


def _triton_rule(module: str, empty: Callable[[Problem, Sequence[int]], list[Tensor]]) -> Rule:
    backward = "backward" if module == "forward" else module
    return Rule(_at_first_use(module, "forward"), empty, _at_first_use(backward, "backward"))


TRITON_SWEEP = make_operator("triton_sweep", _triton_rule("forward", _empty_statistics))
TRITON_GATHER = make_operator("triton_gather", _triton_rule("gather", gather.empty))


def _triton_sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> list[Tensor]:
    indices = [INDEX[name] for name in fields]
    return TRITON_SWEEP(problem, indices, len(indices), in_place=in_place)


def _triton_gather(problem: Problem) -> Tensor:
    return TRITON_GATHER(problem, [1], 1)[0]


REFERENCE = Backend(reference.sweep, reference.gather)
CHUNKED = Backend(sweep.sweep, gather.gather, rowwise.number)
TRITON = Backend(_triton_sweep, _triton_gather, partial(rowwise.number, arithmetic=rowwise.TRITON))
FORCED_ROUTE: ContextVar[str | None] = ContextVar("route", default=None)


def _measured_number(problem: Problem, kind: int) -> list[Tensor] | None:
    """A number by the route that was the quickest on this GPU; "products" where none was measured."""
    heads = [tensor for source in problem.streams.values() for tensor in head_tensors(source)]
    key = measured.route_key(rowwise.KINDS[kind], trained=expect_gradient(*heads))
    route = measured.PRODUCTS
    if not torch.compiler.is_compiling():
        route = FORCED_ROUTE.get() or measured.measured_on(problem.device).routes.get(key, route)
    if route == measured.REGISTERS:
        return None
    arithmetic = rowwise.TRITON if route == measured.PRODUCTS else rowwise.PYTORCH
    return rowwise.number(problem, kind, arithmetic)


# What "auto" takes where "triton" can run.
AUTO_ON_CUDA = TRITON._replace(number=_measured_number)


@contextmanager
def routed(route: str) -> Iterator[None]:
    """Makes "auto" take one route (see `triton.measured`) on CUDA, to measure it."""
    token = FORCED_ROUTE.set(route)
    try:
        yield
    finally:
        FORCED_ROUTE.reset(token)


def backend_of(name: str, problem: Problem) -> Backend:
    """The backend called `name` for `problem`. Raises ValueError where there is none."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    if name == "reference":
        return REFERENCE
    if name == "triton":
        refusal = _refusal(problem)
        if refusal is not None:
            raise ValueError(f"backend: 'triton' {refusal}; use 'auto'")
        return TRITON
    if name == "auto" and problem.device.type == "cuda" and _refusal(problem) is None:
        return AUTO_ON_CUDA
    return CHUNKED


def _refusal(problem: Problem) -> str | None:
    """Why "triton" cannot run; None where it can."""
    if problem.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, got torch.float64"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if problem.device.type == "cuda":
        got = torch.cuda.get_device_capability(problem.device)
        return None if got >= sizes.CAPABILITY else f"needs compute capability 8.0 or more, got {got}"
    if problem.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"runs on CUDA, on a CPU only with TRITON_INTERPRET=1 from the start, got tensors on {problem.device}"
    )
