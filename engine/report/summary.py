"""A run in a few numbers, read from its records: what a person wants to know first."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etpo.engine.config import Config, resolve
from etpo.engine.run_folder import RunFolder, read_records

WINDOW = 100
SYNTHETIC = ":synthetic"
FAR = 1.0  # nat a token from the reference; runs that learn well stay below a half
RUNAWAY = 2.0  # a mean value by the largest return that there can be
REPEATS = 0.25  # share of different programs


@dataclass(frozen=True)
class Program:
    """One executed program: where it stands, what it is, what became of it."""

    step: int
    reward: float
    outcome: str | None
    auc_mean: float | None
    auc_std: float | None
    error: str | None
    text: str
    env: int = 0
    episode: int = 0
    t: int = 0


@dataclass(frozen=True)
class BestProgram:
    """The program with the highest AUC, the first of equals."""

    step: int
    text: str
    auc_mean: float
    auc_std: float | None


@dataclass(frozen=True)
class Window:
    """Some programs in a row. `auc_mean` is over those that ran; None where none did."""

    n: int
    runnable_share: float
    reward_mean: float
    auc_mean: float | None
    auc_best: float | None
    distinct_share: float


@dataclass(frozen=True)
class Learned:
    """What came of a run.

    Attributes:
        config: its configuration.
        data_name: what it learned on; a generated twin is called synthetic.
        n_programs, wall_s: programs executed, seconds taken.
        first, last: the first and the last 100 programs, or half of them where there are fewer than 200.
        has_auc: True where the environment scores programs on data.
        best: None where no program ran.
        kl_ref: of the last iteration, nat a token.
        metrics: the records of metrics.jsonl.
        programs: all programs, in order.
    """

    config: Config
    data_name: str
    n_programs: int
    wall_s: float
    first: Window
    last: Window
    has_auc: bool
    best: BestProgram | None
    kl_ref: float | None
    metrics: list[dict[str, Any]]
    programs: list[Program]


def learned(folder: RunFolder) -> Learned:
    """Sum up a run that has executed at least one program.

    Raises:
        ValueError: nothing was executed yet, or config.toml is none.
    """
    config = resolve({}, folder.config_file)
    metrics = read_records(folder.metrics_file)
    programs, best = read_programs(folder.programs_file)
    if not metrics or not programs:
        raise ValueError(
            f"{folder.path}: expected a run with at least one iteration, got none; go on with --resume"
        )
    n_window = min(WINDOW, max(1, len(programs) // 2))
    return Learned(
        config=config,
        data_name=data_name(config),
        n_programs=len(programs),
        wall_s=metrics[-1]["wall_s"],
        first=window(programs[:n_window]),
        last=window(programs[-n_window:]),
        has_auc=any(p.outcome is not None for p in programs),
        best=best,
        kl_ref=metrics[-1]["kl_ref"],
        metrics=metrics,
        programs=programs,
    )


def data_name(config: Config) -> str:
    """The data set or environment; a generated twin always bears the word synthetic."""
    if config.env is not None:
        return config.env
    if config.dataset.endswith(SYNTHETIC):
        return f"{config.dataset.removesuffix(SYNTHETIC)} (synthetic twin)"
    return Path(config.dataset).stem if config.dataset.endswith(".csv") else config.dataset


def read_programs(path: Path) -> tuple[list[Program], BestProgram | None]:
    """The records of programs.jsonl, and the best program; a last line cut by a kill is left out."""
    programs: list[Program] = []
    best: BestProgram | None = None
    if not path.exists():
        return programs, best
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                r = json.loads(line)
            except json.JSONDecodeError:
                break
            auc = r["auc_mean"]
            programs.append(
                Program(
                    r["step"], r["reward"], r["outcome"], auc, r["auc_std"], r["error"], r["text"],
                    r.get("env", 0), r.get("episode", r["step"]), r.get("t", 0),
                )
            )  # fmt: skip
            if auc is not None and (best is None or auc > best.auc_mean):
                best = BestProgram(r["step"], r["text"], auc, r["auc_std"])
    return programs, best


def window(programs: Iterable[Program]) -> Window:
    """Shares and means of some programs, at least one."""
    programs = list(programs)
    aucs = [p.auc_mean for p in programs if p.auc_mean is not None]
    n = len(programs)
    return Window(
        n=n,
        runnable_share=len(aucs) / n,
        reward_mean=sum(p.reward for p in programs) / n,
        auc_mean=sum(aucs) / len(aucs) if aucs else None,
        auc_best=max(aucs, default=None),
        distinct_share=len({p.text for p in programs}) / n,
    )


def warnings(run: Learned) -> list[str]:
    """What says that a run went wrong, a sentence each: it ran away, its values did, or it repeats itself."""
    last, config = run.metrics[-1], run.config
    told = []
    kl = last.get("kl_ref")
    if kl is not None and kl > FAR:
        told.append(
            f"The policy stands {kl:.1f} nat a token from the model that it started as, so far that it may "
            "have lost its language: read its programs. A larger --beta, or a smaller --max-kl-update, holds "
            "it nearer."
        )
    most = max(abs(p.reward) for p in run.programs) * config.max_episode_steps
    value = max((abs(last[key]) for key in ("q_mean", "v_mean") if last.get(key) is not None), default=0.0)
    if value > RUNAWAY * max(most, 1e-9):
        told.append(
            f"Values have run away: their mean is {value:.3g}, where no return of an episode can exceed "
            f"{most:.3g}. What was learned since then is no guide; try a smaller --lr."
        )
    if len(run.programs) >= WINDOW and run.last.distinct_share < REPEATS < run.first.distinct_share:
        told.append(
            f"The policy repeats itself: of its last {run.last.n} programs {run.last.distinct_share:.0%} are "
            f"different. A larger --beta keeps it more open."
        )
    return told


def duration(seconds: float) -> str:
    """`1 h 02 min`, `2 min 05 s`, `7 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
