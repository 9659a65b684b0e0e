"""What `etpo train` shows while it runs: a live view on a terminal, plain lines elsewhere."""

import time
from typing import Any, Protocol

import click

from etpo.engine.config import Config
from etpo.engine.report.summary import duration

LINES = 20
QUIET_S = 30.0


class View(Protocol):
    """A context manager that is called with the metrics of every iteration."""

    def __enter__(self) -> "View": ...
    def __exit__(self, *exc: object) -> None: ...
    def __call__(self, metrics: dict[str, Any]) -> None: ...


def progress_view(config: Config, title: str, *, resumed: bool) -> View:
    """The live view where standard output is a terminal, else plain lines."""
    from rich.console import Console

    console = Console()
    clock = Clock(config.steps, resumed=resumed)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(config, title, clock, console)
    return PlainLines(config, title, clock)


class Clock:
    """Estimates the time left from the iterations seen so far.

    Args:
        steps: programs of the whole run.
        resumed: the run goes on from a step that only the first iteration tells.
    """

    def __init__(self, steps: int, *, resumed: bool) -> None:
        self.steps = steps
        self._first: tuple[int, float] | None = None if resumed else (0, 0.0)

    def left_s(self, metrics: dict[str, Any]) -> float | None:
        """Seconds left, or None where nothing is known yet."""
        step, wall_s = metrics["step"], metrics["wall_s"]
        if self._first is None:
            self._first = (step, wall_s)
        done = step - self._first[0]
        return (wall_s - self._first[1]) / done * (self.steps - step) if done else None


class PlainLines:
    """A line now and then: for log files and pipes."""

    def __init__(self, config: Config, title: str, clock: Clock) -> None:
        self.config, self.title, self.clock = config, title, clock
        self._shown_step = 0
        self._shown_at = time.monotonic()

    def __enter__(self) -> "PlainLines":
        click.echo(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, metrics: dict[str, Any]) -> None:
        step, steps = metrics["step"], self.config.steps
        left_s = self.clock.left_s(metrics)
        quiet_s = time.monotonic() - self._shown_at
        if (step - self._shown_step) * LINES >= steps or quiet_s >= QUIET_S or step >= steps:
            self._shown_step, self._shown_at = step, time.monotonic()
            parts = [f"{label} {text}" for label, text in figures(metrics, on_data=self.config.env is None)]
            click.echo(f"{step:>{len(str(steps))}}/{steps}  " + "  ".join([*parts, f"left {_left(left_s)}"]))


class LiveView:
    """A bar, the figures of the last iteration, and how to stop."""

    def __init__(self, config: Config, title: str, clock: Clock, console: Any) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.config, self.title, self.clock = config, title, clock
        self.bar = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("programs"), TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"), expand=True, console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=config.steps, left="…")
        self.figures: list[tuple[str, str]] = []
        self.live = Live(get_renderable=self._view, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveView":
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.figures = figures(metrics, on_data=self.config.env is None)
        left = _left(self.clock.left_s(metrics))
        self.bar.update(self.task, completed=metrics["step"], left=left)

    def _view(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        if self.figures:
            line = Text("   ").join(Text.assemble((f"{k} ", "dim"), (v, "bold")) for k, v in self.figures)
        else:
            line = Text("loading the model, starting the environments …", "dim")
        return Group(Text(self.title, "bold"), self.bar, line, Text("Ctrl-C saves and stops", "dim"))


def figures(metrics: dict[str, Any], *, on_data: bool) -> list[tuple[str, str]]:
    """(name, value) of what is worth watching; a value that there is not yet is a dash.

    Args:
        metrics: of one iteration.
        on_data: False where the environment is no data set, and no program has an AUC.
    """
    formats = [("reward", "reward_mean", "{:.3f}")]
    if on_data:
        formats += [("runnable", "runnable_share", "{:.0%}"), ("best AUC", "auc_best", "{:.4f}")]
    formats += [("KL", "kl_ref", "{:.3f}"), ("tokens/s", "tokens_per_s", "{:,.0f}")]
    return [
        (label, "–" if metrics[key] is None else form.format(round(metrics[key], 6) + 0.0))
        for label, key, form in formats
    ]


def _left(seconds: float | None) -> str:
    return "…" if seconds is None else duration(seconds)
