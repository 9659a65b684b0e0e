"""A comparison as Markdown, JSON and a figure."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from etpo.bench.compare import Comparison, Row
from etpo.bench.compare_figure import Line, Panel, figure
from etpo.bench.compare_results import Result
from etpo.bench.compare_statistics import RESAMPLES, Interval, band, running_mean
from etpo.bench.compare_tuning import Trial
from etpo.bench.compare_variants import Settings
from etpo.engine.machine import in_words, machine

PACKAGES = ("torch", "numpy")
CURVE_WINDOW = 50  # programs that a point of a convergence figure is the mean of


def to_markdown(found: Comparison, title: str, command: str) -> str:
    """The tables: equal programs and equal CPU time, equal KL, the frontier, what tuning tried, all seeds."""
    plan, first = found.plan, found.rows[0].variant.name
    n_seeds = len(found.rows[0].results)
    lines = [f"# {title}", "", f"Made by `{command}`.", "", in_words(machine(*PACKAGES)), ""]
    lines += [_how(found, n_seeds), ""]
    lines += [f"## At equal programs ({plan.steps}) and at equal CPU time", ""]
    lines += _main_table(found, first)
    if any(row.equal_kl for row in found.rows):
        lines += ["", "## At equal KL to the reference", "", *_equal_kl_table(found.rows, first)]
    lines += ["", "## Reward against KL to the reference", "", *_frontier_table(found.rows)]
    if found.trials:
        lines += ["", "## Tuning", "", *_tuning_table(found)]
    lines += ["", "## Every seed", "", *seeds_table([*found.rows, *([found.frozen] if found.frozen else [])])]
    return "\n".join(lines) + "\n"


def _how(found: Comparison, n_seeds: int) -> str:
    plan = found.plan
    n_window = min(100, max(1, plan.steps // 2))
    tuned = (
        f"Each algorithm had {plan.n_tune} tuning run{'s' * (plan.n_tune > 1)} on seeds from 100 on; "
        "shown is its best setting."
        if plan.n_tune
        else "No algorithm was tuned: each is as it is by default."
    )
    text = (
        f"{tuned} Reward: mean of the last {n_window} programs of each of {n_seeds} seeds, the same for all. "
        f"In brackets 95 % intervals: bootstrap over seeds, {RESAMPLES:,} resamples, percentiles expanded "
        "for few seeds. p: Wilcoxon's signed-rank test of pairs by seed. CPU time: seconds of all processes "
        "of a run; at equal CPU time an algorithm is shown with the programs that it had done when the "
        "fastest, with the same seed, had done all."
    )
    if found.level_of_stopping is not None:
        text += (
            f" Seeds were added until every difference was decided, at most {plan.n_seeds}; at each look the "
            f"level was {found.level_of_stopping:.4f}, which keeps 95 % over all looks."
        )
    return text


def _main_table(found: Comparison, first: str) -> list[str]:
    head = (
        f"| algorithm | setting | reward | {first} less it | p | reward, equal CPU "
        f"| {first} less it, equal CPU | runs | KL | CPU s a run | best program, fresh splits |"
    )
    lines = [head, rule(head)]
    for row in [*found.rows, *([found.frozen] if found.frozen else [])]:
        rival = row.rival
        cells = [
            row.variant.name, settings_text(row.variant.settings), interval_text(row.last),
            interval_text(rival.difference if rival else None, sign=True),
            "–" if rival is None else f"{rival.wilcoxon_p:.4f}",
            interval_text(row.at_equal_cpu if row is not found.frozen else None),
            interval_text(rival.at_equal_cpu if rival else None, sign=True),
            f"{row.runnable_share:.2f}", f"{row.kl:.3f}",
            "–" if row.cpu_s is None else f"{row.cpu_s:.0f}" + ("*" if _is_estimated(row) else ""),
            interval_text(row.auc_fresh),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if any(_is_estimated(row) for row in found.rows):
        lines += ["", "\\* In part estimated: a run was cut while nobody watched its CPU time."]
    return lines


def _is_estimated(row: Row) -> bool:
    return any(result.usage.is_estimated for result in row.results)


def _equal_kl_table(rows: Sequence[Row], first: str) -> list[str]:
    kls = [one.kl for one in rows[0].equal_kl]
    head = "| algorithm | " + " | ".join(f"reward at KL {kl:.3f} | {first} less it" for kl in kls) + " |"
    lines = [head, rule(head)]
    for row in rows:
        cells = [row.variant.name]
        for one in row.equal_kl:
            less = None if row is rows[0] else one.difference
            cells += [interval_text(one.reward), interval_text(less, sign=True)]
        cells += ["–"] * (1 + 2 * len(kls) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "KL in nat a token; the second is the highest that every algorithm reached."]


def _frontier_table(rows: Sequence[Row]) -> list[str]:
    head = "| algorithm | KL → reward, means over seeds of the iterations in each bin of KL |"
    lines = [head, rule(head)]
    for row in rows:
        points = ", ".join(f"{p.kl:.3f} → {p.reward:+.3f}" for p in row.points)
        lines.append(f"| {row.variant.name} | {points or '–'} |")
    return lines


def _tuning_table(found: Comparison) -> list[str]:
    head = "| algorithm | setting | seed | reward | KL | |"
    lines = [head, rule(head)]
    for row in found.rows:
        for trial in found.trials.get(row.variant.name, ()):
            is_taken = set(trial.settings) <= set(row.variant.settings)
            kl = "–" if trial.kl is None else f"{trial.kl:.3f}"
            note = f"failed: {trial.failure}" if trial.failure else "taken" if is_taken else ""
            lines.append(
                f"| {row.variant.name} | {settings_text(trial.settings)} | {trial.seed} "
                f"| {trial.reward:+.3f} | {kl} | {note.replace('|', '/')} |"
            )
    return lines


def seeds_table(rows: Sequence[Row]) -> list[str]:
    """Every run of every row."""
    head = (
        "| algorithm | seed | reward | highest reward | runs | AUC of running | KL | best AUC | fresh splits "
        "| CPU s | wall s |"
    )
    lines = [head, rule(head)]
    for row in rows:
        for r in row.results:
            auc = [_number(x, 4) for x in (r.auc_running, r.auc_best, r.auc_fresh)]
            cost = [_number(x, 0) for x in (r.usage.cpu_s, r.usage.wall_s)]
            lines.append(
                f"| {row.variant.name} | {r.case.seed} | {r.last:+.4f} | {r.rewards_P.max():+.4f} "
                f"| {r.runnable_share:.2f} | {auc[0]} | {r.kl:.4f} "
                f"| {auc[1]} | {auc[2]} | {' | '.join(cost)} |"
            )
    return lines


def to_json(found: Comparison, command: str) -> str:
    """Everything that the tables say, and every seed; rewards of every program stay in the work folder."""
    table = {
        "command": command,
        "environment": machine(*PACKAGES),
        "dataset": found.plan.dataset,
        "steps": found.plan.steps,
        "n_tune": found.plan.n_tune,
        "level_of_stopping": found.level_of_stopping,
        "trials": {name: [_trial(t) for t in own] for name, own in found.trials.items()},
        "rows": [row_record(row) for row in found.rows],
        "frozen": row_record(found.frozen) if found.frozen else None,
    }
    return json.dumps(table, indent=1) + "\n"


def row_record(row: Row) -> dict[str, Any]:
    """A row as plain data."""
    record = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name not in ("variant", "results")
    }
    plain = {name: _plain(value) for name, value in record.items()}
    variant = {"algorithm": row.variant.name, "settings": dict(row.variant.settings)}
    return variant | plain | {"seeds": [result_record(result) for result in row.results]}


def result_record(r: Result) -> dict[str, Any]:
    """A run as plain data."""
    return {
        "seed": r.case.seed, "last": r.last, "highest": float(r.rewards_P.max()),
        "runnable_share": r.runnable_share, "auc_running": r.auc_running, "kl": r.kl, "auc_best": r.auc_best,
        "auc_fresh": r.auc_fresh, "cpu_s": r.usage.cpu_s, "wall_s": r.usage.wall_s,
        "cost_is_estimated": r.usage.is_estimated,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _trial(trial: Trial) -> dict[str, Any]:
    return dataclasses.asdict(trial) | {"settings": dict(trial.settings)}


def to_svg(found: Comparison) -> str:
    """Two panels: reward over programs, with bands over seeds, and reward against KL."""
    frontier_lines = [
        Line(row.variant.name, [(max(p.kl, 0.0), p.reward) for p in row.points])
        for row in found.rows
        if row.points
    ]
    panels = [convergence(f"{found.plan.dataset}: reward over programs", found.rows)]
    if frontier_lines:
        x_label = "KL to the reference (nat a token)"
        panels.append(Panel("Reward against KL", frontier_lines, x_label, "reward", dots=True))
    return figure(panels)


def convergence(title: str, rows: Sequence[Row]) -> Panel:
    """Running mean of the rewards over programs, mean over seeds with its 95 % band."""
    lines = []
    for row in rows:
        n = min(len(result.rewards_P) for result in row.results)
        window = min(CURVE_WINDOW, max(1, n // 4))
        running_SP = running_mean(np.stack([result.rewards_P[:n] for result in row.results]), window)
        shown = np.unique(np.linspace(window, n, min(n, 120)).astype(int)) - 1
        mean, low, high = band(running_SP[:, shown])
        xs = [float(x) for x in shown + 1]
        pairs = list(zip(low.tolist(), high.tolist(), strict=True)) if len(row.results) > 1 else []
        lines.append(Line(row.variant.name, list(zip(xs, mean.tolist(), strict=True)), pairs))
    return Panel(title, lines, "programs executed", "reward, running mean")


def interval_text(one: Interval | None, *, sign: bool = False) -> str:
    """`0.432 [0.391, 0.470]`; in bold where a difference (`sign`) is decided; a dash for None."""
    if one is None:
        return "–"
    form = "+.3f" if sign else ".3f"
    text = f"{one.mean:{form}} [{one.low:{form}}, {one.high:{form}}]"
    return f"**{text}**" if sign and one.excludes_zero() else text


def settings_text(settings: Settings) -> str:
    """`lr 0.15, max_kl_update 0.05`, or `default`."""
    return ", ".join(f"{name} {value}" for name, value in settings) or "default"


def _number(x: float | None, decimals: int) -> str:
    return "–" if x is None else f"{x:.{decimals}f}"


def rule(head: str) -> str:
    """The line under the heading of a Markdown table."""
    return "|" + "---|" * (head.count("|") - 1)
