"""Time, memory and error of the kernels beside their peers: interleaved rounds, one case at a time.

Every round runs each contestant once, so that what else the machine does in that minute falls on all alike;
ratios are taken within a round, and their median is reported.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from etpo.bench.kernels.cases import Call, Case, Inputs, first_tokens, make_inputs, with_gradients
from etpo.bench.kernels.limits import Products, flush_cache, needed_bytes, needed_flops, synchronize
from etpo.bench.kernels.memory import bytes_of, eager_bytes, free_bytes, inputs_bytes, peak_bytes
from etpo.bench.kernels.peers import EAGER, Contestant

Tell = Callable[[str], None]
Save = Callable[[list["Row"]], None]

PRODUCTS = "bare products"
# Contestants that hold all logits at once.
MATERIALISED = (EAGER.name, "torch.compile", "etpo reference")
# Tokens on which the error against float64 is taken: a row's error does not depend on the other rows.
ERROR_TOKENS = 32
# Two sets of hidden states take turns, so that no call finds the results of its last one in a cache.
ROTATED = 2


@dataclass(frozen=True)
class Spread:
    """Seconds over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """One contestant on one case; `why_not` says why it did not run, and then nothing else is known."""

    function: str
    heads: str
    shape: str
    n_vocab: int
    d_model: int
    n_tokens: int
    dtype: str
    contestant: str
    note: str = ""
    why_not: str | None = None
    forward_s: Spread | None = None
    backward_s: Spread | None = None
    both_s: Spread | None = None
    ratio_to_eager: float | None = None
    ratio_to_products: float | None = None
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    error_value: float | None = None
    error_gradient: float | None = None
    same_twice: bool | None = None


@dataclass
class Runner:
    """A contestant with its inputs at hand, and what was measured of it."""

    name: str
    note: str = ""
    why_not: str | None = None
    call: Call | None = None
    is_mean: bool = False
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    peak: int | None = None
    gradient_bytes: int | None = None
    errors: tuple[float, float] | None = None
    same_twice: bool | None = None

    @property
    def both_s(self) -> list[float]:
        return [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]


def measure(
    cases: list[Case],
    contestants: list[Contestant],
    rounds: int,
    tell: Tell = print,
    save: Save = lambda rows: None,
) -> list[Row]:
    """A row for every contestant of every case, and one for the bare matrix products.

    A contestant that cannot run there, or that fails, is a row that says why. save: gets all rows so far
    after each case, so that a run that is cut short loses one case.
    """
    rows: list[Row] = []
    for case in cases:
        tell(f"{case.name}, {case.shape.name}, {case.n_tokens} tokens")
        own = [c for c in contestants if case.function.name in c.functions]
        try:
            rows += measure_case(case, own, rounds)
        except Exception as error:
            rows += [_row(case, Runner(c.name, c.note, _text_of(error)), []) for c in own]
        _free(case)
        save(rows)
    return rows


def measure_case(case: Case, contestants: list[Contestant], rounds: int) -> list[Row]:
    """The rows of one case."""
    runners = [
        Runner(c.name, c.note, c.why_not(case) or _too_large(case, c), is_mean=c.is_mean) for c in contestants
    ]
    need = inputs_bytes(case, 4)
    if need > free_bytes(case.device):
        for runner in runners:
            runner.why_not = f"the inputs need {need / 2**30:.1f} GiB, more than is free"
        return [_row(case, runner, runners) for runner in runners]
    sets = [make_inputs(case)]
    sets += [_other_rows(sets[0], k) for k in range(1, ROTATED)]
    for runner, contestant in zip(runners, contestants, strict=True):
        if runner.why_not is None:
            _try(runner, partial(_prepare, runner, contestant, case, sets[0]))
    products = None if case.function.from_logits else Products(case, sets[0])
    bare = Runner(PRODUCTS, "the fewest matrix products, alone")
    for k in range(rounds):
        inputs = sets[k % len(sets)]
        for runner in runners:
            if runner.why_not is None:
                _try(runner, partial(_time, runner, case, inputs))
        if products is not None:
            _time_products(bare, products, case, warm=k == 0)
    everyone = runners if products is None else [*runners, bare]
    return [_row(case, runner, everyone) for runner in everyone]


def _too_large(case: Case, contestant: Contestant) -> str | None:
    """Why a contestant that holds all logits would run out of memory; None where it would not."""
    if contestant.name not in MATERIALISED:
        return None
    need = eager_bytes(case, max(4, case.dtype.itemsize)) + inputs_bytes(case, case.dtype.itemsize)
    if need <= free_bytes(case.device):
        return None
    return f"needs about {need / 2**30:.0f} GiB, more than is free"


def _try(runner: Runner, work: Callable[[], None]) -> None:
    """A peer may fail in any way; its row then says how."""
    try:
        work()
    except Exception as error:
        runner.why_not = _text_of(error)
        runner.call = None


def _text_of(error: Exception) -> str:
    """The error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _free(case: Case) -> None:
    """Hands back what a peer that ran out of memory left in the allocator's cache."""
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


def _other_rows(inputs: Inputs, shift: int) -> Inputs:
    return inputs._replace(
        hidden=[t.roll(shift, 0) for t in inputs.hidden], logits=[t.roll(shift, 0) for t in inputs.logits]
    )


def _prepare(runner: Runner, contestant: Contestant, case: Case, inputs: Inputs) -> None:
    """Makes the call and takes what needs no clock: two runs, whether they agree, peak memory, error."""
    runner.call = contestant.make(case.function)
    outputs, gradients = run_once(case, runner.call, inputs)
    runner.gradient_bytes = bytes_of(gradients)
    again: list[Tensor] = []

    def run() -> None:
        for tensors in run_once(case, runner.call, inputs):
            again.extend(tensors)

    runner.peak = peak_bytes(run, case.device)
    runner.same_twice = all(torch.equal(a, b) for a, b in zip([*outputs, *gradients], again, strict=True))
    del outputs, gradients, again[:]
    runner.errors = errors_of(case, runner.call, inputs, is_mean=runner.is_mean)


def cotangents_of(outputs: list[Tensor]) -> list[Tensor]:
    """The same random cotangents for every contestant."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(tuple(out.shape), generator=generator, dtype=torch.float64) for out in outputs]
    return [g.to(out) for g, out in zip(made, outputs, strict=True)]


def run_once(
    case: Case, call: Call | None, inputs: Inputs, clock: list[float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients) of one forward and backward. clock: gets the seconds of each."""
    assert call is not None
    fresh, wanted = with_gradients(case, inputs)
    synchronize(case.device)
    start = time.perf_counter()
    outputs = call(fresh)
    synchronize(case.device)
    middle = time.perf_counter()
    # A statistic of frozen streams alone has no gradient in plain PyTorch.
    pairs = zip(outputs, cotangents_of(outputs), strict=True)
    live = [(out, g) for out, g in pairs if out.requires_grad]
    synchronize(case.device)
    again = time.perf_counter()
    gradients = list(torch.autograd.grad([out for out, _ in live], wanted, [g for _, g in live]))
    synchronize(case.device)
    if clock is not None:
        clock += [middle - start, time.perf_counter() - again]
    return [out.detach() for out in outputs], gradients


def _time(runner: Runner, case: Case, inputs: Inputs) -> None:
    clock: list[float] = []
    flush_cache(case.device)
    run_once(case, runner.call, inputs, clock)
    runner.forward_s.append(clock[0])
    runner.backward_s.append(clock[1])


def _time_products(bare: Runner, products: Products, case: Case, *, warm: bool) -> None:
    if warm:
        products.forward()
    flush_cache(case.device)
    for work, times in ((products.forward, bare.forward_s), (products.backward, bare.backward_s)):
        synchronize(case.device)
        start = time.perf_counter()
        work()
        synchronize(case.device)
        times.append(time.perf_counter() - start)


def errors_of(case: Case, call: Call, inputs: Inputs, *, is_mean: bool) -> tuple[float, float] | None:
    """Relative error of the results, and the largest of the gradients', against float64 of the same inputs.

    In the 2-norm over the first tokens; None where the heads in float64 would not fit in memory.
    """
    small = case._replace(n_tokens=min(ERROR_TOKENS, case.n_tokens))
    if 2 * inputs_bytes(small, 8) + eager_bytes(small, 8) > free_bytes(case.device):
        return None
    exact = first_tokens(inputs, small.n_tokens, torch.float64)

    def eager(x: Inputs) -> list[Tensor]:
        outputs = small.function.eager(x)[:n_outputs]
        return [out.mean() for out in outputs] if is_mean else outputs

    got, got_grads = run_once(small, call, first_tokens(inputs, small.n_tokens, case.dtype))
    n_outputs = len(got)
    want, want_grads = run_once(small, eager, exact)
    value = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    return value, max(relative_error(a, b) for a, b in zip(got_grads, want_grads, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    return float((got.double() - want).norm() / want.norm())


def _spread(times: list[float]) -> Spread:
    return Spread(statistics.median(times), min(times), max(times))


def paired(times: list[float], base: list[float]) -> float | None:
    """The median over rounds of time / time of the base in the same round."""
    if not times or len(times) != len(base):
        return None
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def _row(case: Case, runner: Runner, everyone: list[Runner]) -> Row:
    heads = "given logits" if case.function.from_logits else "trained" if case.trained else "frozen"
    row = partial(
        Row, case.function.name, heads, case.shape.name, case.shape.n_vocab, case.shape.d_model,
        case.n_tokens, str(case.dtype).removeprefix("torch."), runner.name, runner.note,
    )  # fmt: skip
    if runner.why_not is not None:
        return row(why_not=runner.why_not)
    base = {other.name: other.both_s for other in everyone if other.why_not is None}
    both = _spread(runner.both_s)
    value, gradient = runner.errors or (None, None)
    return row(
        forward_s=_spread(runner.forward_s),
        backward_s=_spread(runner.backward_s),
        both_s=both,
        ratio_to_eager=paired(runner.both_s, base.get(EAGER.name, [])),
        ratio_to_products=paired(runner.both_s, base.get(PRODUCTS, [])),
        flops_per_s=needed_flops(case) / both.median or None,
        bytes_per_s=needed_bytes(case) / both.median,
        peak_bytes=runner.peak,
        gradient_bytes=runner.gradient_bytes,
        error_value=value,
        error_gradient=gradient,
        same_twice=runner.same_twice,
    )
