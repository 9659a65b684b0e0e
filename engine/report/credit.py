"""What the page shows of credit.jsonl: some programs of each tenth of a run, and where blame falls."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

TENTHS = 10
RANDOM = 4
COLUMNS = ("logprob", "logprob_ref", "kl", "q", "v", "advantage")


@dataclass(frozen=True)
class Blamed:
    """Failed programs of one part of a run whose error names a line.

    Attributes:
        first, last: its first and last program.
        n: such programs.
        on_line, on_line_update, by_chance: shares, None where there is no such program (docs/metrics.md).
    """

    first: int
    last: int
    n: int
    on_line: float | None
    on_line_update: float | None
    by_chance: float | None


def bounds(n_programs: int, parts: int = TENTHS) -> list[tuple[int, int]]:
    """(first, last) program of equal parts of a run, at most as many as it has programs."""
    parts = min(parts, n_programs)
    edges = [i * n_programs // parts for i in range(parts + 1)]
    return [(a + 1, b) for a, b in itertools.pairwise(edges)]


def blamed(records: Sequence[Record], n_programs: int, parts: int = TENTHS) -> list[Blamed]:
    """Of each part of a run, the last row being the whole of it; nothing where no update knew values."""
    counts = [r for r in records if r["kind"] == "blame"]
    if not counts:
        return []
    return [_share(counts, *part) for part in [*bounds(n_programs, parts), (1, n_programs)]]


def _share(counts: Sequence[Record], first: int, last: int) -> Blamed:
    inside = [r for r in counts if first <= r["step"] <= last]
    n = sum(r["n"] for r in inside)

    def share(name: str) -> float | None:
        return sum(r[name] for r in inside) / n if n else None

    return Blamed(first, last, n, share("on_line"), share("on_line_update"), share("by_chance"))


def pooled(runs: Sequence[Sequence[Blamed]]) -> list[Blamed]:
    """The same parts of several runs together, every failed program counting once.

    Raises:
        ValueError: the runs are not parted alike.
    """
    return [_together(parts) for parts in zip(*runs, strict=True)]


def _together(parts: Sequence[Blamed]) -> Blamed:
    n = sum(part.n for part in parts)

    def share(name: str) -> float | None:
        return sum(part.n * (getattr(part, name) or 0.0) for part in parts) / n if n else None

    first, last = min(part.first for part in parts), max(part.last for part in parts)
    return Blamed(first, last, n, share("on_line"), share("on_line_update"), share("by_chance"))


def shown(records: Sequence[Record], n_programs: int) -> list[Record]:
    """For the page: of each tenth the best, the worst and some random programs with their tokens' numbers.

    Of programs that failed alike badly one whose error names a line is shown as the worst. A tenth of which
    nothing was kept is left out.
    """
    programs = [r for r in records if r["kind"] == "program" and r["texts"]]
    sampled = _still_sampled(programs)
    tenths = []
    for first, last in bounds(n_programs):
        here = [r for r in programs if first <= r["step"] <= last]
        if not here:
            continue
        best = max(here, key=lambda r: (r["reward"], -r["step"]))
        worst = min(here, key=lambda r: (r["reward"], r["line"] is None, r["step"]))
        drawn = [r for r in here if r["step"] in sampled]
        drawn = sorted(sorted(drawn, key=lambda r: r["draw"])[:RANDOM], key=lambda r: r["step"])
        chosen = [("best", best), ("worst", worst), *((f"random {i + 1}", r) for i, r in enumerate(drawn))]
        tenths.append({"first": first, "last": last, "programs": [_slim(why, r) for why, r in chosen]})
    return tenths


def _still_sampled(programs: Sequence[Record]) -> set[int]:
    """Steps of the programs that are in the random sample of their stretch to the end."""
    stretches: dict[int, dict[int, float]] = {}
    for r in programs:
        if "sample" in r["why"]:
            stretches.setdefault(r["stretch"], {})[r["step"]] = r["draw"]
    return {
        step for draws in stretches.values() for step in sorted(draws, key=draws.__getitem__)[:RANDOM]
    }  # fmt: skip


def _slim(why: str, r: Record) -> Record:
    kept = ("step", "t", "reward", "outcome", "error", "line", "lines", "texts")
    return {"why": why, **{k: r[k] for k in kept}, **{k: r[k] for k in COLUMNS if k in r}}
