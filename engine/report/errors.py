"""Kinds of errors by name, and how often each came up in the course of a run."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from etpo.engine.report.summary import Program

NAMED = 6  # kinds that are named in the chart; what is left is `other`
OTHER = "other"
OUTCOMES = {
    "ok": "ran",
    "error": "Python error",
    "timeout": "took too long",
    "memory": "too much memory",
    "refused": "refused before running",
    "invalid_output": "no valid probabilities",
    "crashed": "process died",
    "dishonest": "used labels that it was not given",
}


@dataclass(frozen=True)
class Kind:
    """One kind of error.

    Attributes:
        name: the exception's, or what became of the program.
        early, late: programs with it in the first and in the second half of the run.
        latest: its latest message.
    """

    name: str
    early: int
    late: int
    latest: str


def kind_of(program: Program) -> str | None:
    """The name of what went wrong: an exception's, else the outcome in words; None where nothing did."""
    if program.outcome in (None, "ok") and not program.error:
        return None
    if program.outcome in (None, "error", "ok"):
        match = re.match(r"(?:line \d+: )?([A-Za-z_][\w.]*)(?::|$)", program.error or "")
        return match[1] if match else "other errors" if program.outcome is None else OUTCOMES["error"]
    return OUTCOMES.get(program.outcome, program.outcome)


def kinds(programs: Sequence[Program]) -> list[Kind]:
    """Every kind of error, the most frequent first."""
    half = programs[len(programs) // 2].step
    found: dict[str, list[Program]] = {}
    for program in programs:
        kind = kind_of(program)
        if kind is not None:
            found.setdefault(kind, []).append(program)
    rows = []
    for name, same in found.items():
        late = sum(p.step >= half for p in same)
        rows.append(Kind(name, len(same) - late, late, same[-1].error or ""))
    return sorted(rows, key=lambda row: -(row.early + row.late))


def shares_over_time(
    programs: Sequence[Program], names: Sequence[str], n_bins: int
) -> list[tuple[str, dict[str, float]]]:
    """(last step, share of the programs with each kind of error) of equal parts of a run.

    Args:
        names: the kinds that are told apart; all others together are `other`.
    """
    n_bins = min(n_bins, len(programs))
    bins = []
    for i in range(n_bins):
        part = programs[i * len(programs) // n_bins : (i + 1) * len(programs) // n_bins]
        counts = Counter(kind if kind in names else OTHER for kind in map(kind_of, part) if kind is not None)
        bins.append((f"{part[-1].step:,}", {name: count / len(part) for name, count in counts.items()}))
    return bins
