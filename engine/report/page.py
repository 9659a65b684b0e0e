"""report.html: what a run did, as one page that stands alone and fetches nothing."""

import base64
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from etpo import __version__
from etpo.engine.report import credit as credits
from etpo.engine.report.charts import SMOOTHED_OVER, Series, line_chart, stacked_bars
from etpo.engine.report.episodes import best_programs, chains
from etpo.engine.report.errors import NAMED, OTHER, OUTCOMES, kind_of, kinds, shares_over_time
from etpo.engine.report.highlight import family
from etpo.engine.report.summary import Learned, Program, Window, duration, learned, warnings
from etpo.engine.run_folder import RunFolder, read_records, write_atomically

BINS = 10
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Curve:
    """One chart of metrics: `keys` are (key, name) of its lines; the metric `minus` is taken from each.

    `where` says which runs have it.
    """

    title: str
    keys: tuple[tuple[str, str], ...]
    caption: str
    unit: str
    where: Literal["all", "auc", "etpo"] = "all"
    smooth: bool = False
    low: float | None = None
    high: float | None = None
    minus: str | None = None


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its caption, and (class, name) of each colour that needs a word."""

    title: str
    svg: Markup
    caption: str
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = False


CURVES = (
    Curve("Reward", (("reward_mean", "reward"),),
          "Mean reward of the programs of each iteration; on a data set, a program that fails earns −1.",
          "reward", smooth=True),
    Curve("Runnable share", (("runnable_share", "runnable"),),
          "Share of the programs that ran and were scored.", "%", "auc", smooth=True, low=0.0, high=1.0),
    Curve("Best AUC", (("auc_best", "best AUC"),),
          "The best program so far: mean over five random halvings.", "ROC AUC", "auc"),
    Curve("Distinct programs", (("distinct_share", "distinct"),),
          "Share of different texts among the last 100 programs; a fall says that the policy repeats itself.",
          "%", low=0.0, high=1.0),
    Curve("Entropy", (("entropy", "entropy"),),
          "Entropy of the policy at the tokens that it drew.", "nat a token", low=0.0),
    Curve("KL to the reference", (("kl_ref", "KL"),),
          "How far the policy has moved from the model that it started as.", "nat a token", "etpo", low=0.0),
    Curve("KL of one update", (("kl_update", "KL"),),
          "How far each update moved the policy; the dashed line is the bound.",
          "nat a token", "etpo", low=0.0),
    Curve("Value", (("v_mean", "V"),),
          "Mean V at the tokens that were drawn: what the learner expected there.", "reward", "etpo"),
    Curve("Target less value", (("q_mean", "y − V"),),
          "Mean target less mean V at the tokens that were drawn: above 0 where programs did better than was "
          "expected of them.", "reward", "etpo", smooth=True, minus="v_mean"),
    Curve("Value's loss", (("loss_q", "loss"),),
          "Squared distance between value and target; etpo-q: the critic's Huber loss.",
          "reward²", "etpo", smooth=True, low=0.0),
    Curve("Policy's loss", (("loss_pi", "loss"),),
          "What the policy descends; docs/metrics.md says it for each algorithm.",
          "see caption", "etpo", smooth=True),
)  # fmt: skip


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` of a run that has executed at least one program; returns its path.

    Raises:
        ValueError: nothing was executed yet.
        OSError: the file cannot be written.
    """
    write_atomically(folder.report_file, run_page(folder))
    return folder.report_file


def run_page(folder: RunFolder, live: str = "") -> str:
    """The page of a run.

    Args:
        live: names this state of the run; a page that has one asks its server for news.

    Raises:
        ValueError: nothing was executed yet.
    """
    run = learned(folder)
    records = read_records(folder.credit_file)
    data: dict[str, Any] = {
        "title": f"{run.config.algo} on {run.data_name}",
        "facts": _facts(run),
        "stopped": _stopped(run, folder, live),
        "warnings": warnings(run),
        "verdict": _verdict(run),
        "before": _before(run),
        "curves": _curves(run),
        "credit": _credit(run, records),
        "blamed": [_blamed_row(row, run.n_programs) for row in credits.blamed(records, run.n_programs)],
        "best": best_programs(run.programs) if run.has_auc else None,
        "best_command": _best_command(folder),
        "kinds": kinds(run.programs),
        "outcomes": run.has_auc,
        "error_charts": _error_charts(run),
        "chains": chains(run.programs),
        "programs": packed(_all_programs(run.programs)),
        "starts": starts_of(folder),
        "config": folder.config_file.read_text(encoding="utf-8"),
        "live": live,
    }
    data["sections"] = [
        (anchor, name) for anchor, name, there in (
            ("before", "Before and after", True), ("curves", "Curves", True),
            ("credit", "Credit of tokens", data["credit"]), ("best", "Best programs", run.has_auc),
            ("errors", "Errors", data["kinds"] or run.has_auc), ("episodes", "Corrections", data["chains"]),
            ("programs", "All programs", True), ("settings", "How it was made", True),
        ) if there
    ]  # fmt: skip
    return render("run.html.j2", data)


def render(template: str, data: dict[str, Any]) -> str:
    """A page from one of the templates."""
    return _environment().get_template(template).render(**data)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "version": __version__,
        "auc": _auc,
        "live": "",
        **{
            name: Markup((TEMPLATES / file).read_text(encoding="utf-8").rstrip())
            for name, file in (("style", "style.css"), ("script", "script.js"))
        },
    }
    return environment


def packed(value: Any) -> str:
    """A value as JSON, deflated, in base64: small, and nothing in it can end a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8", "surrogatepass"), 9)).decode("ascii")


def in_script(value: Any) -> Markup:
    """A value as JSON that can stand in a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _facts(run: Learned) -> dict[str, str]:
    config = run.config
    return {
        "data set" if config.env is None else "environment": run.data_name,
        "model": config.agent or config.model,
        "algorithm": config.algo,
        "programs": f"{run.n_programs:,} of {config.steps:,}",
        "seed": str(config.seed),
        "wall time": duration(run.wall_s),
        "β, γ, λ": f"{config.beta:g}, {config.gamma:g}, {config.lam_in_force:g}",
    }


def _stopped(run: Learned, folder: RunFolder, live: str) -> str | None:
    if run.n_programs >= run.config.steps:
        return None
    said = f"{run.n_programs:,} of {run.config.steps:,} programs"
    if live:
        return f"This run goes on: {said} so far."
    return f"This run stopped after {said}; it goes on with: {folder.resume_command}"


def _verdict(run: Learned) -> str:
    first, last, n = run.first, run.last, run.first.n
    told = []
    if run.has_auc:
        told.append(f"Of the first {n} programs, {first.runnable_share:.0%} ran; ")
        told[0] += f"of the last {n}, {last.runnable_share:.0%}."
    told.append(f"The mean reward went from {_signed(first.reward_mean)} to {_signed(last.reward_mean)}.")
    if run.best is not None:
        told.append(f"The best program has an AUC of {_auc(run.best.auc_mean, run.best.auc_std)}.")
    if run.kl_ref is not None and run.config.algo != "reflection":
        moved = _signed(run.kl_ref)
        told.append(f"The policy stands {moved} nat a token (KL) from the model that it started as.")
    return " ".join(told)


def _before(run: Learned) -> dict[str, Any]:
    n = run.first.n

    def row(name: str, part: Window) -> tuple[str, list[str]]:
        cells = [_signed(part.reward_mean)]
        if run.has_auc:
            cells = [f"{part.runnable_share:.0%}", *cells, _number(part.auc_mean), _number(part.auc_best)]
        return name, [*cells, f"{part.distinct_share:.0%}"]

    names = ["mean reward"]
    if run.has_auc:
        names = ["ran", *names, "mean AUC of those that ran", "best AUC"]
    rows = [row(f"first {n} programs", run.first), row(f"last {n} programs", run.last)]
    return {"head": [*names, "distinct"], "rows": rows}


def _curves(run: Learned) -> list[Figure]:
    figures = []
    for curve in CURVES:
        lines = [
            Series(name, [(m["step"], _less(m.get(key), m, curve.minus)) for m in run.metrics], css)
            for (key, name), css in zip(curve.keys, "ab", strict=False)
        ]
        is_wanted = {"all": True, "auc": run.has_auc, "etpo": run.config.algo != "reflection"}[curve.where]
        if not is_wanted or all(y is None for line in lines for _, y in line.points):
            continue
        bound = run.config.max_kl_in_force if curve.keys[0][0] == "kl_update" else None
        chart = line_chart(
            lines, unit=curve.unit, smooth=curve.smooth, low=curve.low, high=curve.high, bound=bound
        )
        note = (
            f" Strong line: mean over {SMOOTHED_OVER} iterations around each."
            if curve.smooth and len(run.metrics) > SMOOTHED_OVER
            else ""
        )
        figures.append(Figure(curve.title, Markup(chart), curve.caption + note))
    return figures


def _less(value: float | None, metrics: dict[str, Any], minus: str | None) -> float | None:
    if minus is None or value is None:
        return value
    other = metrics.get(minus)
    return None if other is None else value - other


def _credit(run: Learned, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    tenths = credits.shown(records, run.n_programs)
    if not tenths or not any("advantage" in p for tenth in tenths for p in tenth["programs"]):
        return None
    has_values = any("q" in p for tenth in tenths for p in tenth["programs"])
    is_of_tokens = run.config.algo.startswith("etpo")
    weight = "weight in the update"
    columns = [("advantage", f"{weight}: y − V" if has_values else f"{weight}: the program's advantage")]
    if is_of_tokens:
        columns.insert(0, ("moved", "Q − V: what the token changed"))
        lead = (
            "Each token is coloured by Q − V, its advantage: how much better (blue) or worse (orange) the "
            "learner expected the program to end once the token stood there. Underlined: the most blamed "
            "token of a program that failed."
        )
    else:
        lead = (
            "This algorithm gives every token of a program the same advantage: the program's reward against "
            "what others earned."
        )
    data = {"tenths": tenths, "advantage": "y − V" if has_values else "advantage"}
    return {"lead": lead, "n": len(tenths), "columns": columns, "data": in_script(data)}


def _blamed_row(row: credits.Blamed, n_programs: int) -> dict[str, Any]:
    whole = row.last - row.first + 1 == n_programs
    name = "all" if whole else f"{row.first:,} to {row.last:,}"
    shares = (row.on_line, row.on_line_update, row.by_chance)
    return {"name": name, "cells": [f"{row.n:,}", *("–" if s is None else f"{s:.0%}" for s in shares)]}


def _best_command(folder: RunFolder) -> str | None:
    """The command that the head of best_program.py gives, with its target; None where there is none."""
    try:
        lines = folder.best_file.read_text(encoding="utf-8").splitlines()[:8]
    except OSError:
        return None
    return next((line.strip() for line in lines if line.strip().startswith("python best_program.py")), None)


def _error_charts(run: Learned) -> list[Figure]:
    programs, figures = run.programs, []
    if run.has_auc:
        n_bins = min(BINS, len(programs))
        bins = []
        for i in range(n_bins):
            part = programs[i * len(programs) // n_bins : (i + 1) * len(programs) // n_bins]
            counts = Counter(p.outcome or "ok" for p in part)
            bins.append(
                (f"{part[-1].step:,}", {OUTCOMES.get(k, k): c / len(part) for k, c in counts.items()})
            )
        seen = {name: f"k-{kind}" for kind, name in OUTCOMES.items() if any(name in b for _, b in bins)}
        chart = stacked_bars(bins, seen, "programs executed, up to", "What became of the programs over time")
        caption = "Share of each outcome, in the order of execution, in equal parts."
        legend = [(css, name) for name, css in seen.items()]
        figures.append(Figure("What became of the programs", Markup(chart), caption, legend))
    found = kinds(programs)
    if found:
        names = [kind.name for kind in found[:NAMED]]
        bins = shares_over_time(programs, names, BINS)
        seen = {name: f"c{i}" for i, name in enumerate(names)}
        if len(found) > NAMED:
            seen[OTHER] = f"c{NAMED}"
        chart = stacked_bars(bins, seen, "programs executed, up to", "Kinds of errors over time")
        caption = "Share of all programs that failed with each kind of error."
        legend = [(css, name) for name, css in seen.items()]
        figures.append(Figure("Kinds of errors", Markup(chart), caption, legend))
    return figures


def _all_programs(programs: Sequence[Program]) -> dict[str, Any]:
    """The table of all programs, a list a column; outcomes and kinds are places in lists of names, or −1."""
    outcomes = [name for kind, name in OUTCOMES.items() if any(p.outcome == kind for p in programs)]
    names = [kind.name for kind in kinds(programs)]
    return {
        "outcomes": outcomes,
        "kinds": names,
        "step": [p.step for p in programs],
        "reward": [round(p.reward, 4) for p in programs],
        "outcome": [_place(OUTCOMES.get(p.outcome or "", ""), outcomes) for p in programs],
        "kind": [_place(kind_of(p), names) for p in programs],
        "text": [p.text for p in programs],
        "error": [p.error for p in programs],
        "family": [family(p.text) for p in programs],
    }


def _place(name: str | None, names: Sequence[str]) -> int:
    return names.index(name) if name in names else -1


def starts_of(folder: RunFolder) -> list[dict[str, str]]:
    """How each part of a run was started, from origin.json; empty where a run has none."""
    try:
        starts = json.loads(folder.origin_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [{k: str(v) for k, v in start.items() if v is not None} for start in starts]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _auc(mean: float, std: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "")
