"""`--log`: a run's metrics to wandb, trackio or mlflow, by their own packages, which `etpo[log]` installs.

A run that goes on goes on in the tracker too: log.json in its folder keeps what the tracker calls it.
TensorBoard events are written by `RunFolder`. Where a tracker writes to is up to its own settings
(WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI, …).
"""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etpo import EtpoError
from etpo.engine.callbacks import Callback, Metrics
from etpo.engine.config import Config, log_names
from etpo.engine.run_folder import write_atomically

if TYPE_CHECKING:
    from etpo.engine.progress import Outcome


class LoggerMissing(EtpoError):
    """The package of a tracker is not installed."""

    exit_code = 2


class Logger(Callback):
    """Sends metrics to a tracker; the three below say how.

    Attributes:
        name: the tracker's, as in `--log`.
        package: what is imported.
    """

    name: str
    package: str

    def __init__(self) -> None:
        try:
            self.module: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise LoggerMissing(
                f"--log {self.name}: expected the package {self.package}, got {error}; "
                "install it with: pip install 'etpo[log]'"
            ) from error

    def on_start(self, config: Config, folder: Path) -> None:
        ids = read_ids(folder)
        ids[self.name] = self.start(config, folder, ids.get(self.name))
        write_atomically(folder / "log.json", json.dumps(ids) + "\n")

    def on_iteration(self, metrics: Metrics) -> None:
        numbers = {
            key: value for key, value in metrics.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }  # fmt: skip
        self.send(numbers, metrics["step"])

    def start(self, config: Config, folder: Path, known: str | None) -> str:
        """Begin, or go on with what the tracker called `known`; returns what it calls this run."""
        raise NotImplementedError

    def send(self, numbers: dict[str, float], step: int) -> None:
        """One iteration's numbers."""
        raise NotImplementedError


class Wandb(Logger):
    """Weights & Biases."""

    name = package = "wandb"

    def start(self, config: Config, folder: Path, known: str | None) -> str:
        self.run = self.module.init(
            project="etpo", name=folder.name, config=dataclasses.asdict(config), id=known, resume="allow"
        )
        return str(self.run.id)

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def on_end(self, outcome: "Outcome | None") -> None:
        self.run.finish(exit_code=0 if outcome is not None else 1)


class Trackio(Logger):
    """Trackio, on this machine."""

    name = package = "trackio"

    def start(self, config: Config, folder: Path, known: str | None) -> str:
        settings = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
        name = known or folder.name
        self.run = self.module.init(project="etpo", name=name, config=settings, resume="allow")
        return name

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def on_end(self, outcome: "Outcome | None") -> None:
        self.run.finish()


class Mlflow(Logger):
    """MLflow."""

    name = package = "mlflow"

    def start(self, config: Config, folder: Path, known: str | None) -> str:
        if known is None:
            self.module.set_experiment("etpo")
        run = self.module.start_run(run_id=known, run_name=None if known else folder.name)
        if known is None:
            self.module.log_params(dataclasses.asdict(config))
        return str(run.info.run_id)

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.module.log_metrics(numbers, step=step)

    def on_end(self, outcome: "Outcome | None") -> None:
        self.module.end_run("FINISHED" if outcome is not None else "FAILED")


LOGGERS = {logger.name: logger for logger in (Wandb, Trackio, Mlflow)}


def loggers_of(config: Config) -> list[Callback]:
    """The loggers that `config.log` names, but for TensorBoard, which the run's folder writes.

    Raises:
        LoggerMissing: a package is not installed.
    """
    return [LOGGERS[name]() for name in log_names(config.log) if name in LOGGERS]


def read_ids(folder: Path) -> dict[str, str]:
    """What trackers call the run in a folder, by the tracker's name."""
    try:
        ids: dict[str, str] = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids
