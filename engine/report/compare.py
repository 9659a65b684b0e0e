"""Several runs on one page: grouped by their settings, means over seeds with their intervals."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from scipy import stats

from etpo.engine.config import Config
from etpo.engine.report.charts import Series, line_chart
from etpo.engine.report.credit import Blamed, blamed, pooled
from etpo.engine.report.page import Figure, render
from etpo.engine.report.summary import WINDOW, Learned, Program, duration, learned, window
from etpo.engine.run_folder import RunFolder, read_records, write_atomically

BINS = 25
COLOURS = 7
LEVEL = 0.95
# Options that say where and how far, not what: runs that differ in nothing else are one group.
NOT_COMPARED = ("seed", "out", "threads", "device", "checkpoint_every", "steps", "preset")


@dataclass(frozen=True)
class Run:
    """One run: where it is, what came of it, its records of blame."""

    path: Path
    learned: Learned
    credit: list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, a seed each; `name` tells them from other groups."""

    name: str
    runs: list[Run]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the bounds of its interval; both None where there is one seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measure:
    """One number of a run, for tables; None where it has none. A share's interval ends at 0 and 1."""

    name: str
    of: Callable[[Run], float | None]
    format: str
    is_share: bool = False


def interval_of(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of one value a seed, at 95 %."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, None, None)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach)


def write_comparison(folders: Sequence[RunFolder], out: Path) -> Path:
    """Write the page of several runs; returns its path.

    Raises:
        ValueError: one of them has executed nothing yet.
        OSError: the file cannot be written.
    """
    write_atomically(out, comparison_page(folders))
    return out


def comparison_page(folders: Sequence[RunFolder]) -> str:
    """The page of several runs; see `write_comparison`."""
    groups = grouped(load_runs(folders))
    runs = [run for group in groups for run in group.runs]
    least = min(run.learned.n_programs for run in runs)
    notes = []
    if len({run.learned.n_programs for run in runs}) > 1:
        notes.append(
            f"The runs executed different numbers of programs; the tables are of the first {least:,} of each."
        )
    if len({run.learned.data_name for run in runs}) > 1:
        notes.append("The runs are not all on one task: their rewards are of different things.")
    measures = measures_of(runs, least)
    rows = [
        {"css": f"c{i % COLOURS}", "name": group.name, "cells": [str_cell(len(group.runs)), *(
            _cell(measure, group) for measure in measures)]}
        for i, group in enumerate(groups)
    ]  # fmt: skip
    names, values = differing(groups)
    return render("compare.html.j2", {
        "title": f"{len(runs)} runs" + (f" on {runs[0].learned.data_name}" if len(notes) < 2 else ""),
        "facts": {"runs": len(runs), "groups": len(groups), "programs compared": f"{least:,} of each run"},
        "notes": notes,
        "table": {"head": ["group", "seeds", *(measure.name for measure in measures)], "rows": rows},
        "legend": [(row["css"], row["name"]) for row in rows],
        "curves": curves(groups),
        "differ": {"head": [group.name for group in groups], "rows": list(zip(names, values, strict=True))},
        "runs": {
            "head": ["run", "group", "seed", *(m.name for m in measures), "time"],
            "rows": [
                [run.path.name, group.name, run.learned.config.seed,
                 *(_format(m, m.of(run)) for m in measures), duration(run.learned.wall_s)]
                for group in groups for run in group.runs
            ],
        },
    })  # fmt: skip


def comparison(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """The tables of the page as JSON: the groups with their intervals, and each run's numbers."""
    groups = grouped(load_runs(folders))
    runs = [run for group in groups for run in group.runs]
    measures = measures_of(runs, min(run.learned.n_programs for run in runs))
    return {
        "groups": [
            {"name": group.name, "seeds": [run.learned.config.seed for run in group.runs],
             **{m.name: dataclasses.asdict(found) if (found := _interval(m, group)) else None
                for m in measures},
             "blame": [dataclasses.asdict(row) for row in _blame(group)]}
            for group in groups
        ],
        "runs": [
            {"path": str(run.path), "group": group.name, "seed": run.learned.config.seed,
             **{m.name: m.of(run) for m in measures},
             "blame": [dataclasses.asdict(row) for row in blamed(run.credit, run.learned.n_programs)]}
            for group in groups for run in group.runs
        ],
    }  # fmt: skip


def _blame(group: Group) -> list[Blamed]:
    """Where blame falls, by tenths of the runs; nothing where an update knew no values."""
    return pooled([rows for run in group.runs if (rows := blamed(run.credit, run.learned.n_programs))])


def load_runs(folders: Sequence[RunFolder]) -> list[Run]:
    """The runs with their records."""
    return [Run(f.path, learned(f), read_records(f.credit_file)) for f in folders]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings differ in the seed alone belong together; named by what tells groups apart."""
    members: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(compared(run.learned.config).values()), []).append(run)
    names, values = _differing([compared(same[0].learned.config) for same in members.values()])
    return [
        Group(_name(same[0], names, [row[i] for row in values]), sorted(same, key=_seed))
        for i, same in enumerate(members.values())
    ]


def _name(run: Run, names: Sequence[str], values: Sequence[str]) -> str:
    config = run.learned.config
    parts = [config.algo] if "algo" in names or not names else []
    parts += [f"{name} {value}" for name, value in zip(names, values, strict=True) if name != "algo"]
    return ", ".join(parts)


def _seed(run: Run) -> tuple[int, str]:
    return run.learned.config.seed, str(run.path)


def compared(config: Config) -> dict[str, Any]:
    """The options that make up what a run is; λ and the bound as they are in force."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_COMPARED}
    return values | {"lam": config.lam_in_force, "max_kl_update": config.max_kl_in_force}


def differing(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(names, values) of the options in which groups differ, a row an option."""
    return _differing([compared(group.runs[0].learned.config) for group in groups])


def _differing(settings: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in settings[0] if len({str(one[name]) for one in settings}) > 1]
    return names, [["–" if one[name] is None else str(one[name]) for one in settings] for name in names]


def measures_of(runs: Sequence[Run], least: int) -> list[Measure]:
    """What is told of each run: of its programs up to number `least`, the same for all."""
    n = min(WINDOW, max(1, least // 2))

    def tail(run: Run) -> list[Program]:
        return run.learned.programs[least - n : least]

    def share_on_line(run: Run) -> float | None:
        rows = blamed(run.credit, least)
        return rows[-1].on_line if rows else None

    measures = [Measure(f"reward, last {n}", lambda run: window(tail(run)).reward_mean, "{:.3f}")]
    if any(run.learned.has_auc for run in runs):
        measures += [
            Measure(f"ran, last {n}", lambda run: window(tail(run)).runnable_share, "{:.0%}", True),
            Measure("best AUC", lambda run: window(run.learned.programs[:least]).auc_best, "{:.4f}", True),
        ]
    measures += [
        Measure("distinct", lambda run: window(tail(run)).distinct_share, "{:.0%}", True),
        Measure("KL to the reference", lambda run: _metric_at(run, "kl_ref", least), "{:.3f}"),
    ]
    if any(share_on_line(run) is not None for run in runs):
        measures.append(Measure("blame on the named line", share_on_line, "{:.0%}", True))
    return measures


def _metric_at(run: Run, key: str, step: int) -> float | None:
    known = [m[key] for m in run.learned.metrics if m["step"] <= step and m.get(key) is not None]
    return known[-1] if known else None


def curves(groups: Sequence[Group]) -> list[Figure]:
    """Reward, share that ran, KL: a line a group, the mean over its seeds, with the band of its interval."""
    wanted = [
        ("Reward", "reward", lambda p: p.reward, "Mean reward of the programs"),
        ("Runnable share", "%", lambda p: float(p.auc_mean is not None), "Share of the programs that ran"),
    ]  # fmt: skip
    if not any(run.learned.has_auc for group in groups for run in group.runs):
        wanted = wanted[:1]
    note = ", mean over seeds; the band is its 95 % interval."
    figures = [
        _figure(title, unit, groups, caption + note, partial(_binned, of=of))
        for title, unit, of, caption in wanted
    ]
    for title, key, unit, caption in (
        ("KL to the reference", "kl_ref", "nat a token", "How far the policy has moved"),
        ("Entropy", "entropy", "nat a token", "Entropy of the policy at the tokens that it drew"),
    ):
        if any(m.get(key) is not None for group in groups for run in group.runs for m in run.learned.metrics):
            figures.append(_figure(title, unit, groups, caption + note, partial(_metric, key=key)))
    return figures


def _binned(run: Run, of: Callable[[Program], float]) -> list[tuple[float, float]]:
    programs = run.learned.programs
    n = min(BINS, len(programs))
    parts = [programs[i * len(programs) // n : (i + 1) * len(programs) // n] for i in range(n)]
    return [(part[-1].step, sum(map(of, part)) / len(part)) for part in parts]


def _metric(run: Run, key: str) -> list[tuple[float, float]]:
    return [(m["step"], m[key]) for m in run.learned.metrics if m.get(key) is not None]


def _figure(
    title: str, unit: str, groups: Sequence[Group], caption: str,
    points_of: Callable[[Run], list[tuple[float, float]]],
) -> Figure:  # fmt: skip
    series = []
    for i, group in enumerate(groups):
        of_seeds = [dict(points_of(run)) for run in group.runs]
        steps = sorted(set.intersection(*(set(one) for one in of_seeds)))
        if not steps:
            continue
        found = [interval_of([one[step] for one in of_seeds]) for step in steps]
        bounds = {"%": (0.0, 1.0), "nat a token": (0.0, math.inf)}.get(unit, (-math.inf, math.inf))
        band = [
            (max(bounds[0], f.low), min(bounds[1], f.high))
            for f in found if f.low is not None and f.high is not None
        ]  # fmt: skip
        points = [(step, f.mean) for step, f in zip(steps, found, strict=True)]
        series.append(Series(group.name, points, f"c{i % COLOURS}", band if len(band) == len(points) else ()))
    return Figure(title, Markup(line_chart(series, unit=unit)), caption)


def _interval(measure: Measure, group: Group) -> Interval | None:
    values = [value for run in group.runs if (value := measure.of(run)) is not None]
    if not values:
        return None
    found = interval_of(values)
    if found.low is None or found.high is None or not measure.is_share:
        return found
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high))


def _format(measure: Measure, value: float | None) -> str:
    return "–" if value is None else measure.format.format(value).replace("-", "−")


def str_cell(value: object) -> dict[str, str]:
    """A table's cell without an interval."""
    return {"mean": str(value), "interval": ""}


def _cell(measure: Measure, group: Group) -> dict[str, str]:
    found = _interval(measure, group)
    if found is None:
        return str_cell("–")
    bounds = "" if found.low is None else f"{_format(measure, found.low)} to {_format(measure, found.high)}"
    return {"mean": _format(measure, found.mean), "interval": bounds}
