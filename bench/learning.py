"""Learning tables: the trained policy beside the frozen model with the same number of programs, by seed.

Every run is an `etpo train` of its own process and folder, so that a table that was cut off goes on where it
stopped, and a row can be repeated by its command. Rows say what came of the first and of the last 100
programs.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etpo.engine.machine import in_words, machine
from etpo.engine.options import nearest
from etpo.engine.report.summary import Window, learned, read_programs
from etpo.engine.run_folder import RunFolder
from etpo.envs.datasets import load_dataset
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Scorer

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """A row's name, and the options of `etpo train` that make it, without data set, steps and seed."""

    name: str
    options: tuple[str, ...] = ()


DEFAULT = Variant("default")
FROZEN = Variant("frozen", ("--algo", "reflection"))
Q = ("--algo", "etpo-q")
# One factor at a time around the default, and around etpo-q: λ 1, normalised, soft, β 0.1, τ 0.9, truncated
# weights of replayed programs, full weights, SGD, 5 updates.
ABLATION = (
    DEFAULT,
    Variant("λ 0.95", ("--lam", "0.95")),
    Variant("lora", ("--roles", "lora")),
    Variant("adamw", ("--optimizer", "adamw")),
    Variant("ppo-kl", ("--algo", "ppo-kl")),
    Variant("rloo", ("--algo", "rloo")),
    Variant("grpo", ("--algo", "grpo")),
    Variant("q", Q),
    Variant("q λ 0", (*Q, "--lam", "0")),
    Variant("q λ 0.9", (*Q, "--lam", "0.9")),
    Variant("q form logits", (*Q, "--q-form", "logits", "--replay-weight", "truncated")),
    Variant("q form residual", (*Q, "--q-form", "residual", "--replay-weight", "truncated")),
    Variant("q backup expected", (*Q, "--backup", "expected")),
    Variant("q β 0.03", (*Q, "--beta", "0.03")),
    Variant("q β 0.3", (*Q, "--beta", "0.3")),
    Variant("q τ 0.995", (*Q, "--tau", "0.995")),
    Variant("q replay weight none", (*Q, "--replay-weight", "none")),
    # as those two forms are where the weight is not given
    Variant("q logits unweighted", (*Q, "--q-form", "logits")),
    Variant("q residual unweighted", (*Q, "--q-form", "residual")),
    Variant("preset paper", ("--preset", "paper")),
    FROZEN,
)


def variants_named(names: list[str]) -> tuple[Variant, ...]:
    """Rows of `ABLATION` by name. Raises ValueError for a name that is not there, or for none."""
    known = {variant.name: variant for variant in ABLATION}
    for name in names or [""]:
        if name not in known:
            close = nearest(name, list(known))
            raise ValueError(f"--rows: expected some of {', '.join(known)}, got '{name}'{close}")
    return tuple(known[name] for name in names)


@dataclass(frozen=True)
class Row:
    """One run. `auc_fresh` is the best program's mean AUC on split seeds 5–24, which chose nothing."""

    variant: str
    seed: int
    n_programs: int
    first: Window
    last: Window
    auc_best: float | None
    auc_fresh: float | None
    kl_ref: float | None
    wall_s: float


def run_table(
    dataset: str, variants: tuple[Variant, ...], seeds: list[int], steps: int, work: Path, *, jobs: int,
    fresh: bool, common: tuple[str, ...] = (), tell: Tell = print,
) -> list[Row]:  # fmt: skip
    """Run every variant with every seed and read the rows.

    Args:
        dataset: a data set's name.
        variants, seeds, steps: what is run; a folder that has its `steps` programs already is only read.
        work: folder of the runs' folders.
        jobs: runs at a time, each with its share of the cores as threads.
        fresh: score each best program on unseen split seeds.
        common: options of every run.
        tell: called with a line for each finished run.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    cases = [(variant, seed) for variant in variants for seed in seeds]

    def one(case: tuple[Variant, int]) -> Row:
        variant, seed = case
        path = work / f"{dataset}-{steps}" / f"{variant.name.replace(' ', '-')}-s{seed}"
        began = time.monotonic()
        _train(path, dataset, steps, seed, threads, (*common, *variant.options))
        row = read_row(variant.name, seed, path)
        tell(f"{variant.name} seed {seed}: {describe(row)} ({time.monotonic() - began:.0f} s)")
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, cases))
    return _score_fresh(rows, dataset, work, steps) if fresh else rows


def _train(path: Path, dataset: str, steps: int, seed: int, threads: int, options: tuple[str, ...]) -> None:
    """Train in the folder `path` unless its run is finished; one that was cut off goes on."""
    config = RunFolder(path).config_file
    programs, _ = read_programs(RunFolder(path).programs_file)
    if len(programs) == steps:
        return
    command = [sys.executable, "-P", "-m", "etpo.cli", "train"]
    if config.is_file():
        command += ["--resume", str(path), "--steps", str(steps)]
    else:
        command += ["--dataset", dataset, "--steps", str(steps), "--seed", str(seed), "--out", str(path)]
        command += ["--threads", str(threads), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def read_row(variant: str, seed: int, path: Path) -> Row:
    """A finished run's row."""
    run = learned(RunFolder(path))
    best = run.best.auc_mean if run.best else None
    return Row(variant, seed, run.n_programs, run.first, run.last, best, None, run.kl_ref, run.wall_s)


def _score_fresh(rows: list[Row], dataset: str, work: Path, steps: int) -> list[Row]:
    done = []
    with Sandbox() as sandbox:
        scorer = Scorer(load_dataset(dataset), sandbox).fresh()
        for row in rows:
            path = work / f"{dataset}-{steps}" / f"{row.variant.replace(' ', '-')}-s{row.seed}"
            best = learned(RunFolder(path)).best
            auc = scorer.score(best.text).auc_mean if best else None
            done.append(dataclasses.replace(row, auc_fresh=auc))
    return done


def describe(row: Row) -> str:
    """One line of a row."""
    first, last = row.first, row.last
    return (
        f"runs {first.runnable_share:.2f} → {last.runnable_share:.2f}, reward {first.reward_mean:+.3f} → "
        f"{last.reward_mean:+.3f}, AUC of running {_number(first.auc_mean)} → {_number(last.auc_mean)}, best "
        f"{_number(row.auc_best)}, distinct {last.distinct_share:.2f}, KL {_number(row.kl_ref)}"
    )


def to_json(rows: list[Row], command: str) -> str:
    """The rows with the environment and the command that made them."""
    table = {
        "command": command,
        "environment": machine("torch", "numpy"),
        "rows": [dataclasses.asdict(r) for r in rows],
    }
    return json.dumps(table, indent=1) + "\n"


HEAD = (
    "| run | seed | programs | runs, first 100 | runs, last 100 | reward, first | reward, last | "
    "AUC of running, first | AUC of running, last | distinct, last | best AUC | best, fresh splits | KL | "
    "wall s |"
)


def to_markdown(rows: list[Row], title: str, command: str) -> str:
    """The rows, and under them each variant's mean and, beside more than one seed, its least and largest."""
    lines = [f"# {title}", "", f"Made by `{command}`.", "", in_words(machine("torch", "numpy")), "", HEAD]
    lines.append("|" + "---|" * HEAD.count(" | ") + "---|")
    names = list(dict.fromkeys(row.variant for row in rows))
    for name in names:
        own = [row for row in rows if row.variant == name]
        lines += [_line(str(row.seed), row) for row in own]
        if len(own) > 1:
            lines.append(_mean_line(own))
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[float | None]:
    first, last = row.first, row.last
    return [
        row.n_programs, first.runnable_share, last.runnable_share, first.reward_mean, last.reward_mean,
        first.auc_mean, last.auc_mean, last.distinct_share, row.auc_best, row.auc_fresh, row.kl_ref,
        row.wall_s,
    ]  # fmt: skip


def _line(seed: str, row: Row) -> str:
    n_programs, *numbers, wall_s = _cells(row)
    return f"| {row.variant} | {seed} | {n_programs} | {' | '.join(map(_number, numbers))} | {wall_s:.0f} |"


def _mean_line(rows: list[Row]) -> str:
    columns = list(zip(*(_cells(row) for row in rows), strict=True))
    known = [[x for x in column if x is not None] for column in columns]
    means = [float(np.mean(column)) if column else None for column in known]
    n_programs, *numbers, wall_s = means
    cells = " | ".join(f"**{_number(x)}**" for x in numbers)
    return f"| **{rows[0].variant}** | mean | {n_programs:.0f} | {cells} | {wall_s:.0f} |"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.4f}" if abs(x) < 10 else f"{x:.1f}"
