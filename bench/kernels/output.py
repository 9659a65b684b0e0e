"""The kernel benchmark's results as JSON and Markdown, with the machine that made them."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from etpo.bench.kernels.goals import goal_lines, goals_of, memory_beside_gradients
from etpo.bench.kernels.measure import PRODUCTS, Row
from etpo.bench.kernels.peers import EAGER
from etpo.bench.kernels.precision import PrecisionRow
from etpo.engine.machine import in_words, machine

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
SCHEDULERS = {os.SCHED_OTHER: "normal", os.SCHED_FIFO: "real-time", os.SCHED_RR: "real-time"}
IMPORT_TIMER = (
    "import torch, time; start = time.perf_counter(); import etpo.kernels; print(time.perf_counter() - start)"
)


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, versions, date, and how long `import etpo.kernels` takes after `import torch`."""
    return {
        **machine(*PACKAGES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": torch.get_num_threads(),
        "priority": SCHEDULERS.get(os.sched_getscheduler(0), "other"),
        "load_average": round(os.getloadavg()[0], 2),
        "import_s": round(import_seconds(), 4),
    }


def import_seconds(repeats: int = 3) -> float:
    """Median seconds of `import etpo.kernels` in a fresh process that has torch already."""
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT_TIMER], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def to_json(rows: Sequence[Row | PrecisionRow], about: dict[str, Any]) -> str:
    """The rows, one a line, under what is known of the run: command, environment, limits."""
    top = json.dumps(about, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(row)) for row in rows)
    return f'{top},\n "rows": [\n{lines}\n ]\n}}\n'


def head_lines(title: str, about: dict[str, Any]) -> list[str]:
    lines = [f"# {title}", "", f"Made by `{about['command']}`.", ""]
    return [*lines, in_words(about["environment"]), ""]


HEADS = {"frozen": "frozen heads", "trained": "trained head", "given logits": "given logits"}
HEAD = (
    "| | forward ms | backward ms | both ms (least–most) | of eager | of the products | GFLOP/s | GB/s | "
    "peak MiB beside gradients | error of values | error of gradients | bitwise the same twice |"
)


def to_markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """A table for each case, a line for each contestant, those that did not run included."""
    lines = head_lines("Kernels beside their peers", about)
    lines += [
        "Times are medians over rounds in which each line runs once; ratios are medians of the ratios within "
        "a round. GFLOP/s counts the fewest matrix products (logits of each stream and each gradient once, "
        "nothing made again), GB/s each input read once and each gradient written once; "
        f"“{PRODUCTS}” is those products alone, the limit of the first, and a copy of memory ran at "
        f"{about['copy_bytes_per_s'] / 1e9:.1f} GB/s, the limit of the second. Errors are relative, in the "
        "2-norm, against float64 of the same inputs.",
        "",
        *goal_lines(goals_of(rows, about["device"])),
    ]
    cases = dict.fromkeys((r.shape, r.n_tokens, r.function, r.heads) for r in rows)
    for shape, n_tokens, function, heads in cases:
        own = [
            r
            for r in rows
            if (r.shape, r.n_tokens, r.function, r.heads) == (shape, n_tokens, function, heads)
        ]
        one = own[0]
        lines += [
            f"## {function}, {HEADS[heads]}: {shape} (V {one.n_vocab}, D {one.d_model}), "
            f"{n_tokens} tokens, {one.dtype}",
            "",
            HEAD,
            "|" + "---|" * HEAD.count(" | ") + "---|",
        ]
        lines += [_line(row) for row in own] + [""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = f"{row.contestant} ({row.note})" if row.note else row.contestant
    if row.why_not is not None or row.both_s is None or row.forward_s is None or row.backward_s is None:
        return f"| {name} | not run: {row.why_not} |" + " |" * (HEAD.count(" | ") - 1)
    beside = memory_beside_gradients(row)
    cells = [
        milliseconds(row.forward_s.median),
        milliseconds(row.backward_s.median),
        "{} ({}–{})".format(*map(milliseconds, dataclasses.astuple(row.both_s))),
        "1" if row.contestant == EAGER.name else _ratio(row.ratio_to_eager),
        "1" if row.contestant == PRODUCTS else _ratio(row.ratio_to_products),
        "–" if row.flops_per_s is None else f"{row.flops_per_s / 1e9:.4g}",
        "–" if row.bytes_per_s is None else f"{row.bytes_per_s / 1e9:.3g}",
        "–" if beside is None else f"{beside / 2**20:.4g}",
        _error(row.error_value),
        _error(row.error_gradient),
        "–" if row.same_twice is None else "yes" if row.same_twice else "no",
    ]
    return f"| {name} | {' | '.join(cells)} |"


SCREEN = "{:<26.26}{:>9}{:>10}{:>9}{:>9}{:>8}{:>9}"


def to_text(rows: list[Row]) -> str:
    """What matters most of each line, in 80 columns; the Markdown and JSON files hold all of it."""
    lines: list[str] = []
    case = None
    for row in rows:
        if case != (case := (row.shape, row.n_tokens, row.function, row.heads)):
            lines += ["", f"{row.function}, {HEADS[row.heads]}: {row.shape}, {row.n_tokens} tokens"]
            lines += [SCREEN.format("", "forward", "backward", "both ms", "of eager", "MiB", "error")]
        if row.both_s is None or row.forward_s is None or row.backward_s is None:
            lines.append(f"{row.contestant:<26.26}not run: {row.why_not}"[:80])
            continue
        times = [milliseconds(x.median) for x in (row.forward_s, row.backward_s, row.both_s)]
        beside = memory_beside_gradients(row)
        errors = [x for x in (row.error_value, row.error_gradient) if x is not None]
        lines.append(SCREEN.format(
            row.contestant, *times, "1" if row.contestant == EAGER.name else _ratio(row.ratio_to_eager),
            "–" if beside is None else f"{beside / 2**20:.3g}", _error(max(errors, default=None)),
        ))  # fmt: skip
    return "\n".join(lines).lstrip("\n")


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def precision_markdown(rows: list[PrecisionRow], about: dict[str, Any]) -> str:
    """One line for each KL, one column for each contestant: the larger error of its two gradients."""
    lines = head_lines("Precision of the KL gradient", about)
    names = list(dict.fromkeys(row.contestant for row in rows))
    lines += [
        f"`linear_kl` with {about['dtype']} inputs, head {about['shape']}, {about['n_tokens']} tokens: the "
        "relative error, in the 2-norm, of the gradient against float64 of the same rounded inputs; the "
        "larger of the errors by the hidden states and by the head. Gradients are returned in the dtype of "
        "the inputs.",
        "",
        "| mean KL, nats | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for kl in dict.fromkeys(row.kl_aimed for row in rows):
        own = {row.contestant: row for row in rows if row.kl_aimed == kl}
        cells = [
            _error(own[name].error_gradient) if own[name].why_not is None else "not run" for name in names
        ]
        lines.append(f"| {own[names[0]].kl_mean:.3g} | {' | '.join(cells)} |")
    reasons = {row.contestant: row.why_not for row in rows if row.why_not is not None}
    lines += ["", *(f"Not run: {name}: {why}." for name, why in reasons.items())]
    notes = {row.contestant: row.note for row in rows if row.note and row.why_not is None}
    lines += [f"{name}: {note}." for name, note in notes.items()]
    return "\n".join(lines).rstrip() + "\n"
