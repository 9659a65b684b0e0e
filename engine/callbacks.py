"""What may look on while a run trains: callbacks of users, and the loggers of `--log` (engine/loggers.py)."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etpo.engine.config import Config
    from etpo.engine.progress import Outcome

Metrics = dict[str, Any]


class Callback:
    """Called in the course of a run; a subclass overrides what it wants to hear of.

    What a callback raises ends the run, as an error of its own would; records so far are on disk.
    """

    def on_start(self, config: "Config", folder: Path) -> None:
        """Before the model is loaded: the complete configuration, and the run's folder."""

    def on_iteration(self, metrics: Metrics) -> None:
        """After each iteration: its line of metrics.jsonl (docs/metrics.md)."""

    def on_end(self, outcome: "Outcome | None") -> None:
        """After the run, also an interrupted one; None where an error ended it."""


class Calls(Callback):
    """A plain function of the metrics as a callback."""

    def __init__(self, function: Callable[[Metrics], object]) -> None:
        self.function = function

    def on_iteration(self, metrics: Metrics) -> None:
        self.function(metrics)


class Callbacks(Callback):
    """Several callbacks as one, called in their order.

    Args:
        callbacks: `Callback`s, or functions of the metrics.

    Raises:
        TypeError: one is neither.
    """

    def __init__(self, callbacks: Iterable[Callback | Callable[[Metrics], object]]) -> None:
        self.callbacks: Sequence[Callback] = [_as_callback(one) for one in callbacks]

    def on_start(self, config: "Config", folder: Path) -> None:
        for one in self.callbacks:
            one.on_start(config, folder)

    def on_iteration(self, metrics: Metrics) -> None:
        for one in self.callbacks:
            one.on_iteration(metrics)

    def on_end(self, outcome: "Outcome | None") -> None:
        for one in self.callbacks:
            one.on_end(outcome)


class ProgressBar(Callback):
    """A bar with the latest figures, in terminals and notebooks."""

    def on_start(self, config: "Config", folder: Path) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=config.steps, unit="program", desc=config.algo, dynamic_ncols=True)

    def on_iteration(self, metrics: Metrics) -> None:
        shown = {"reward": "reward_mean", "KL": "kl_ref", "best AUC": "auc_best"}
        self.bar.set_postfix({k: f"{metrics[m]:.3f}" for k, m in shown.items() if metrics.get(m) is not None})
        self.bar.update(metrics["step"] - self.bar.n)

    def on_end(self, outcome: "Outcome | None") -> None:
        self.bar.close()


def observed(
    run: Callable[[Callable[[Metrics], None]], "Outcome"], callbacks: Callback, config: "Config", folder: Path
) -> "Outcome":
    """Call `run` with what is to be told of each iteration; callbacks hear of its start and its end."""
    callbacks.on_start(config, folder)
    outcome = None
    try:
        outcome = run(callbacks.on_iteration)
        return outcome
    finally:
        callbacks.on_end(outcome)


def is_watched() -> bool:
    """True in a notebook, and where standard error is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


def _as_callback(one: Any) -> Callback:
    if isinstance(one, Callback):
        return one
    if callable(one) and not isinstance(one, type):
        return Calls(one)
    raise TypeError(
        f"callbacks: expected etpo.Callback objects or functions of the metrics, got {one!r}"
        + ("; give an instance of that class" if isinstance(one, type) else "")
    )
