"""Programs worth reading: the best ones beside the first of their family, and episodes of several tries."""

from collections.abc import Sequence
from dataclasses import dataclass

from etpo.engine.report.errors import kind_of
from etpo.engine.report.highlight import DiffLine, difference, family, python
from etpo.engine.report.summary import Program
from etpo.envs.prompts import as_program

BEST = 5
CHAINS = 8


@dataclass(frozen=True)
class Shown:
    """A program to read.

    Attributes:
        program: its record.
        family: what it builds, see `highlight.family`.
        html: its source with its syntax marked.
        origin: the first program of its family, None where that is this one.
        changes: lines of the difference to `origin`.
    """

    program: Program
    family: str
    html: str
    origin: Program | None
    changes: list[DiffLine]


@dataclass(frozen=True)
class Try:
    """One program of an episode: its record, what went wrong, its source, and what it changed."""

    program: Program
    kind: str | None
    html: str
    changes: list[DiffLine]


def best_programs(programs: Sequence[Program], count: int = BEST) -> list[Shown]:
    """The best programs that ran, at most one of each family and text, the best first."""
    ran = [p for p in programs if p.auc_mean is not None]
    shown: dict[str, Program] = {}
    for program in sorted(ran, key=lambda p: (-(p.auc_mean or 0.0), p.step)):
        shown.setdefault(family(program.text), program)
        if len(shown) == count:
            break
    first: dict[str, Program] = {}
    for program in programs:
        name = family(program.text)
        if name in shown:
            first.setdefault(name, program)
    rows = []
    for name, program in shown.items():
        origin = first[name] if first[name].text != program.text else None
        source = as_program(program.text)
        changes = difference(as_program(origin.text), source) if origin is not None else []
        rows.append(Shown(program, name or "no class", python(source), origin, changes))
    return rows


def chains(programs: Sequence[Program], count: int = CHAINS) -> list[list[Try]]:
    """Episodes of more than one program: those that ended well first, then the latest."""
    episodes: dict[tuple[int, int], list[Program]] = {}
    for program in programs:
        episodes.setdefault((program.env, program.episode), []).append(program)
    tried = [episode for episode in episodes.values() if len(episode) > 1]
    tried.sort(key=lambda e: (kind_of(e[-1]) is not None, -len(e), -e[-1].step))
    found = []
    for episode in sorted(tried[:count], key=lambda e: e[0].step):
        steps: list[Try] = []
        for index, program in enumerate(episode):
            source = as_program(program.text)
            before = as_program(episode[index - 1].text) if index else None
            changes = [] if before is None else difference(before, source)
            steps.append(Try(program, kind_of(program), python(source), changes))
        found.append(steps)
    return found
