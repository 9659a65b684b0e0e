"""report.html: what a run did, as one static page that needs no script and fetches nothing."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from etpo import __version__
from etpo.engine.report.charts import SMOOTHED_OVER, Series, line_chart, stacked_bars
from etpo.engine.report.summary import Learned, Program, Window, duration, learned
from etpo.engine.run_folder import RunFolder, write_atomically
from etpo.envs.prompts import as_program

BINS = 10
TYPICAL_ERRORS = 3
OUTCOMES = {
    "ok": "ran",
    "error": "Python error",
    "timeout": "took too long",
    "memory": "too much memory",
    "refused": "refused before running",
    "invalid_output": "no valid probabilities",
    "crashed": "process died",
}


@dataclass(frozen=True)
class Curve:
    """One chart of metrics: `keys` are (key, name) of one or two lines; `where` says which runs have it."""

    title: str
    keys: tuple[tuple[str, str], ...]
    caption: str
    unit: str
    where: Literal["all", "auc", "etpo"] = "all"
    smooth: bool = False
    low: float | None = None
    high: float | None = None


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
    Curve("Values", (("q_mean", "Q"), ("v_mean", "V")),
          'Mean Q (<b class="ink-a">blue</b>) and V (<b class="ink-b">orange</b>) of the target network at '
          "the tokens that were drawn.", "reward", "etpo"),
    Curve("Critic's loss", (("loss_q", "loss"),),
          "Huber distance between Q and its target.", "reward²", "etpo", smooth=True, low=0.0),
    Curve("Policy's loss", (("loss_pi", "loss"),),
          "KL from the policy to the one that the critic asks for.",
          "nat a token", "etpo", smooth=True, low=0.0),
)  # fmt: skip


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` of a run that has executed at least one program; returns its path.

    Raises:
        ValueError: nothing was executed yet.
        OSError: the file cannot be written.
    """
    run = learned(folder)
    parts = [_header(run), _verdict(run), _table(run), _curves(run)]
    if run.has_auc:
        parts += [_outcomes(run.programs), _best_program(run)]
    parts += [_typical_errors(run.programs), _settings(folder)]
    title = f"{run.config.algo} on {run.data_name}"
    write_atomically(folder.report_file, PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts)))
    return folder.report_file


def _header(run: Learned) -> str:
    config = run.config
    facts = {
        "data set" if config.env is None else "environment": run.data_name,
        "model": config.agent or config.model,
        "algorithm": config.algo,
        "programs": f"{run.n_programs:,} of {config.steps:,}",
        "seed": str(config.seed),
        "wall time": duration(run.wall_s),
        "β, γ, λ": f"{config.beta:g}, {config.gamma:g}, {config.lam_in_force:g}",
        "etpo": __version__,
    }
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<header><h1>{escape(config.algo)} on {escape(run.data_name)}</h1><dl>{cells}</dl></header>"


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
    return f'<p class="verdict">{" ".join(told)}</p>'


def _table(run: Learned) -> str:
    n = run.first.n

    def row(name: str, part: Window) -> str:
        cells = [_signed(part.reward_mean)]
        if run.has_auc:
            cells = [f"{part.runnable_share:.0%}", *cells, _number(part.auc_mean), _number(part.auc_best)]
        cells.append(f"{part.distinct_share:.0%}")
        return f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    names = ["mean reward"]
    if run.has_auc:
        names = ["ran", *names, "mean AUC of those that ran", "best AUC"]
    head = "".join(f"<th>{name}</th>" for name in [*names, "distinct"])
    return (
        f'<h2>Before and after</h2><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>'
        f"{row(f'first {n} programs', run.first)}{row(f'last {n} programs', run.last)}</tbody></table></div>"
    )


def _curves(run: Learned) -> str:
    figures = []
    for curve in CURVES:
        lines = [
            Series(name, [(m["step"], m.get(key)) for m in run.metrics], css)
            for (key, name), css in zip(curve.keys, "ab", strict=False)
        ]
        shown = {"all": True, "auc": run.has_auc, "etpo": run.config.algo != "reflection"}[curve.where]
        if not shown or all(y is None for line in lines for _, y in line.points):
            continue
        bound = run.config.max_kl_in_force if curve.keys[0][0] == "kl_update" else None
        chart = line_chart(
            lines, unit=curve.unit, smooth=curve.smooth, low=curve.low, high=curve.high, bound=bound
        )
        note = " Strong line: running mean." if curve.smooth and len(run.metrics) > SMOOTHED_OVER else ""
        figures.append(
            f"<figure><h3>{curve.title}</h3>{chart}<figcaption>{curve.caption}{note}</figcaption></figure>"
        )
    return f'<h2>Curves</h2><div class="figures">{"".join(figures)}</div>'


def _outcomes(programs: Sequence[Program]) -> str:
    n_bins = min(BINS, len(programs))
    bins = []
    for i in range(n_bins):
        part = programs[i * len(programs) // n_bins : (i + 1) * len(programs) // n_bins]
        counts = Counter(p.outcome or "ok" for p in part)
        bins.append((f"{part[-1].step:,}", {kind: count / len(part) for kind, count in counts.items()}))
    seen = [kind for kind in OUTCOMES if any(kind in shares for _, shares in bins)]
    legend = "".join(f'<span><i class="k-{kind}"></i>{OUTCOMES[kind]}</span>' for kind in seen)
    chart = stacked_bars(bins, seen, "programs executed, up to")
    return (
        f'<h2>What became of the programs</h2><figure class="wide">{chart}<div class="legend">{legend}</div>'
        "<figcaption>Outcomes of the programs in the order of their execution, in equal parts.</figcaption>"
        "</figure>"
    )


def _best_program(run: Learned) -> str:
    if run.best is None:
        return "<h2>The best program</h2><p>No program ran to its end.</p>"
    source = escape(as_program(run.best.text).rstrip())
    auc = _auc(run.best.auc_mean, run.best.auc_std)
    return (
        f"<h2>The best program</h2><p>Program {run.best.step:,}: AUC {auc} "
        f"over five random halvings of {escape(run.data_name)}. It can be run on its own: "
        f"<code>python best_program.py DATA.csv --target C</code></p><pre><code>{source}</code></pre>"
    )


def _typical_errors(programs: Sequence[Program]) -> str:
    """The most frequent kinds of errors, each by its latest message, early and late counts beside it."""
    failures = [p for p in programs if p.error]
    if not failures:
        return ""
    half = programs[len(programs) // 2].step
    rows = []
    for kind, count in Counter(_kind_of_error(p) for p in failures).most_common(TYPICAL_ERRORS):
        same = [p for p in failures if _kind_of_error(p) == kind]
        late = sum(p.step >= half for p in same)
        message = escape(same[-1].error or "")
        rows.append(
            f"<tr><td>{count - late}</td><td>{late}</td><td class=msg><code>{message}</code></td></tr>"
        )
    return (
        "<h2>Typical errors</h2><table><thead><tr><th>in the first half</th><th>in the second</th>"
        f"<th class=msg>the latest of its kind</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _kind_of_error(program: Program) -> str:
    """A message without what differs between alike ones: line, quoted names, numbers."""
    text = re.sub(r"^line \d+: ", "", program.error or "")
    return re.sub(r"\d+", "0", re.sub(r"'[^']*'|\"[^\"]*\"", "''", text))[:80]


def _settings(folder: RunFolder) -> str:
    text = escape(folder.config_file.read_text(encoding="utf-8"))
    return f"<details><summary>All settings</summary><pre><code>{text}</code></pre></details>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _auc(mean: float, std: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #fdfdfc; --panel: #f4f4f1; --ink: #1d1f22; --soft: #5f646b; --rule: #dfe0dd;
  --a: #1f5fa8; --b: #c05a12; --ok: #2a8c6a; --error: #d2622a; --timeout: #e0aa2e; --memory: #b770a5;
  --refused: #6aaede; --invalid_output: #7a68b8; --crashed: #4a4e55; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16181b; --panel: #1f2226; --ink: #e6e7e8; --soft: #9aa0a8; --rule: #34383e;
  --a: #6ea8e8; --b: #f0995a; --ok: #4fb38d; --error: #e07a45; --timeout: #e3b84f; --memory: #cf8dbd;
  --refused: #7cbbe6; --invalid_output: #9d8cd9; --crashed: #a7adb5; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; max-width: 70ch; margin: 1.5rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.5rem .35rem 0; text-align: right; font-weight: 400; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-size: .85rem; vertical-align: bottom; }
tbody th, .msg { text-align: left; }
.figures { display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .85rem; }
.wide { max-width: 480px; }
svg { display: block; width: 100%; height: auto; }
.tick { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.bound { stroke: var(--soft); stroke-dasharray: 4 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .45; }
.line.a { stroke: var(--a); }
.line.b { stroke: var(--b); }
.dot.a { fill: var(--a); }
.dot.b { fill: var(--b); }
.unseen { opacity: 0; }
.unseen:hover { opacity: 1; }
.ink-a { color: var(--a); }
.ink-b { color: var(--b); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .85rem; margin: .25rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
pre { background: var(--panel); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem;
  line-height: 1.45; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
pre code { font-size: inherit; }
.msg code { overflow-wrap: anywhere; }
details { margin-top: 2.25rem; }
summary { cursor: pointer; }
""" + "".join(f".k-{kind} {{ fill: var(--{kind}); background: var(--{kind}); }}\n" for kind in OUTCOMES)
