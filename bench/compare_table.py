"""The paper's table and convergence figure: data sets by algorithms by seeds, each as it is configured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from etpo.bench.compare import Row, make_all, rows_of
from etpo.bench.compare_figure import figure
from etpo.bench.compare_output import (
    PACKAGES,
    convergence,
    interval_text,
    row_record,
    rule,
    seeds_table,
    settings_text,
)
from etpo.bench.compare_results import read_result, score_fresh
from etpo.bench.compare_runs import Case, Runs, Tell
from etpo.bench.compare_variants import FROZEN, Variant
from etpo.engine.machine import in_words, machine

Tables = dict[str, tuple[Row, ...]]  # rows by data set


@dataclass(frozen=True)
class Grid:
    """What is run: every variant on every data set with seeds 0 … n − 1.

    `fresh`: score best programs on fresh splits, and run the frozen model too where no variant is it.
    """

    variants: tuple[Variant, ...]
    datasets: tuple[str, ...]
    steps: int
    n_seeds: int
    fresh: bool = True


def run_grid(grid: Grid, runs: Runs, tell: Tell) -> Tables:
    """Make all runs, data set after data set, and sum up.

    Raises:
        ComparisonError: a run failed; the others of its data set were finished before.
    """
    names = list(grid.variants)
    if grid.fresh and all(one.algo != FROZEN for one in names):
        names.append(Variant("frozen model", FROZEN))
    tables: Tables = {}
    for dataset in grid.datasets:
        by_variant = [[Case(v, dataset, seed, grid.steps) for seed in range(grid.n_seeds)] for v in names]
        in_turn = [case for column in zip(*by_variant, strict=True) for case in column]
        make_all(in_turn, runs, tell)
        if grid.fresh:
            score_fresh(runs, in_turn, tell)
        tables[dataset] = rows_of([[read_result(runs, case) for case in own] for own in by_variant])
    return tables


def to_markdown(grid: Grid, tables: Tables, title: str, command: str) -> str:
    """A table for each data set, and every seed."""
    n_window = min(100, max(1, grid.steps // 2))
    how = (
        f"{grid.steps} programs a run, {grid.n_seeds} seeds, the same for all. Highest reward: of any "
        f"program of a run; reward: mean of the last {n_window}. In brackets 95 % intervals of the mean over "
        "seeds: bootstrap, percentiles expanded for few seeds. p: Wilcoxon's signed-rank test of pairs by "
        "seed. Fresh splits: each run's best program on twenty halvings of the data that chose nothing."
    )
    lines = [f"# {title}", "", f"Made by `{command}`.", "", in_words(machine(*PACKAGES)), "", how]
    for dataset, rows in tables.items():
        first = rows[0].variant.name
        head = (
            f"| algorithm | setting | highest reward | reward | {first} less it | p | runs "
            "| best program, fresh splits | KL | CPU s a run |"
        )
        lines += ["", f"## {dataset}", "", head, rule(head)]
        lines += [_line(row) for row in rows]
    for dataset, rows in tables.items():
        lines += ["", f"## Every seed, {dataset}", "", *seeds_table(rows)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    rival = row.rival
    cells = [
        row.variant.name, settings_text(row.variant.settings), interval_text(row.highest),
        interval_text(row.last), interval_text(rival.difference if rival else None, sign=True),
        f"{rival.wilcoxon_p:.4f}" if rival else "–", f"{row.runnable_share:.2f}",
        interval_text(row.auc_fresh), f"{row.kl:.3f}", "–" if row.cpu_s is None else f"{row.cpu_s:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def to_json(grid: Grid, tables: Tables, command: str) -> str:
    """The rows of every data set with every seed, the environment, and the command."""
    table = {
        "command": command,
        "environment": machine(*PACKAGES),
        "steps": grid.steps,
        "n_seeds": grid.n_seeds,
        "datasets": {dataset: [row_record(row) for row in rows] for dataset, rows in tables.items()},
    }
    return json.dumps(table, indent=1) + "\n"


def to_svg(tables: Tables) -> str:
    """The convergence figure: a panel for each data set, bands over seeds."""
    return figure([convergence(dataset, rows) for dataset, rows in tables.items()])


def with_ablations(words: Sequence[str], ablations: Sequence[Sequence[str]]) -> list[str]:
    """Words and those of ablations, each once, in their order."""
    return list(dict.fromkeys([*words, *(word for own in ablations for word in own)]))
