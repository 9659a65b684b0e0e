"""What the kernels are to reach, checked on the rows of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from etpo.bench.kernels.measure import Row
from etpo.bench.kernels.peers import EAGER

# The goals are for heads of language models.
LEAST_VOCAB = 32000
# From here on the heads are too large for a cache, and what eager spends beside its products weighs less.
LARGE_VOCAB = 100_000
OURS = {"cpu": "etpo chunked", "cuda": "etpo triton"}
OF_EAGER_FROZEN, OF_EAGER_FROZEN_LARGE, OF_EAGER = 0.65, 0.85, 1.5
# Of the fewest products: logits of each stream and each gradient once. Nothing that is made again counts as
# needed, so what recomputes is held to the same number.
OF_PRODUCTS = 1.15
MEMORY_OF_EAGER = 0.15
SHARE_OF_BOUND = 0.75
# The published kernels that a GPU's times are held to.
RIVALS = {"linear_kl": ("liger-kernel", "trl.kernels"), "linear_logprob_alone": ("cut-cross-entropy",)}
ONE_NUMBER = ("soft_policy_kl", "linear_kl", "linear_logprob_alone")
GRADIENT_ERROR = 3e-3


@dataclass(frozen=True)
class Goal:
    """measured ≤ limit (≥ where at_least), of one case."""

    what: str
    case: str
    limit: float
    measured: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def goals_of(rows: list[Row], device: str) -> list[Goal]:
    """The goals that `rows`, measured on "cpu" or "cuda", can tell about."""
    goals: list[Goal] = []
    for row in rows:
        if row.contestant == OURS[device] and row.why_not is None and row.n_vocab >= LEAST_VOCAB:
            others = {r.contestant: r for r in rows if _case_of(r) == _case_of(row)}
            goals += _cpu_goals(row, others) if device == "cpu" else _gpu_goals(row, others)
    return goals


def _case_of(row: Row) -> tuple[str, str, str, int]:
    return row.function, row.heads, row.shape, row.n_tokens


def _cpu_goals(row: Row, others: dict[str, Row]) -> Iterator[Goal]:
    case = ", ".join(map(str, _case_of(row)))
    if row.ratio_to_eager is not None and row.function in ("soft_policy_kl", "vocab_stats"):
        limit = OF_EAGER
        if (row.function, row.heads) == ("soft_policy_kl", "frozen"):
            limit = OF_EAGER_FROZEN if row.n_vocab < LARGE_VOCAB else OF_EAGER_FROZEN_LARGE
        yield Goal("time as a share of eager's", case, limit, row.ratio_to_eager)
    if row.ratio_to_products is not None and row.function in ("soft_policy_kl", "linear_kl"):
        yield Goal("time as a multiple of the fewest products'", case, OF_PRODUCTS, row.ratio_to_products)
    ours, eager = memory_beside_gradients(row), memory_beside_gradients(others[EAGER.name])
    if ours is not None and eager is not None and row.function in ("soft_policy_kl", "vocab_stats"):
        yield Goal(
            "peak memory beside the gradients as a share of eager's", case, MEMORY_OF_EAGER, ours / eager
        )


def _gpu_goals(row: Row, others: dict[str, Row]) -> Iterator[Goal]:
    case = ", ".join(map(str, _case_of(row)))
    if row.function in ONE_NUMBER and row.ratio_to_products is not None:
        yield Goal(
            "share of the fewest products' speed", case, SHARE_OF_BOUND, 1 / row.ratio_to_products, True
        )
    for name in RIVALS.get(row.function, ()):
        rival = others.get(name)
        if rival is not None and rival.both_s is not None and row.both_s is not None:
            yield Goal(f"time as a share of {name}'s", case, 1.0, row.both_s.median / rival.both_s.median)
    if row.same_twice is not None:
        yield Goal("bitwise the same twice", case, 1.0, float(row.same_twice), True)
    if row.error_gradient is not None and row.dtype == "bfloat16":
        yield Goal("error of gradients", case, GRADIENT_ERROR, row.error_gradient)


def memory_beside_gradients(row: Row) -> int | None:
    """Bytes of the peak that are not the gradients themselves."""
    if row.peak_bytes is None or row.gradient_bytes is None:
        return None
    return row.peak_bytes - row.gradient_bytes


def goal_lines(goals: list[Goal]) -> list[str]:
    """A Markdown section; nothing where no goal applies."""
    if not goals:
        return []
    lines = ["## Goals", "", "| | case | goal | measured | |", "|---|---|---|---|---|"]
    for goal in goals:
        sign = "≥" if goal.at_least else "≤"
        met = "met" if goal.met else "missed"
        lines.append(f"| {goal.what} | {goal.case} | {sign} {goal.limit:g} | {goal.measured:.3g} | {met} |")
    return [*lines, ""]
