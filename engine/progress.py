"""How far a run has come: its counters, its checkpoints, and going on from one."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from etpo.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from etpo.engine.config import Config, log_names
from etpo.engine.run_folder import RunFolder
from etpo.envs.data_science import DataScience
from etpo.envs.vector import VectorRunner

Observer = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Best:
    """The best program so far."""

    step: int
    action: str
    auc_mean: float
    auc_std: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: programs executed.
        interrupted: True where Ctrl-C or SIGTERM ended it, after saving.
        best: the best program, or None where none ran.
        notes: lines about damaged checkpoints that were passed over.
    """

    step: int
    interrupted: bool
    best: Best | None
    notes: list[str]


class Progress:
    """How far a run has come, whoever acts in it: what its records are made from, and its checkpoints.

    Attributes:
        step: programs executed so far.
        saved_step: `step` at the newest checkpoint.
        wall_s: seconds so far, over all resumptions.
        recent: the last 100 programs' texts, for the distinct share.
        digests: of the `table` that programs are scored on and of the `base` that was trained, where known.
        observations: the state that each environment waits in.
        episode_of, t_of: of each environment, its episode and its next time step.
    """

    def __init__(self, config: Config, folder: RunFolder, environments: VectorRunner) -> None:
        self.config, self.folder, self.environments = config, folder, environments
        folder.writes_events = "tensorboard" in log_names(config.log)
        self.step = 0
        self.saved_step = -1
        self.wall_s = 0.0
        self.best: Best | None = None
        self.recent: deque[str] = deque(maxlen=100)
        first = environments.envs[0]
        table = first.scorer.dataset.digest if isinstance(first, DataScience) else None
        self.digests: dict[str, str | None] = {"table": table}
        self.observations = environments.reset(config.seed)
        self.episode_of = [0] * config.envs
        self.t_of = [0] * config.envs

    def save(self, *, whole: bool = True) -> None:
        """Write a checkpoint of this moment, once; `whole` says that it ends a whole iteration."""
        if self.saved_step != self.step:
            save_checkpoint(self.folder.checkpoints, Checkpoint(self.step, self.tensors(), self.state(whole)))
            self.saved_step = self.step

    def save_if_due(self, n_programs: int, *, whole: bool = True) -> None:
        """Write a checkpoint where the last `n_programs` passed a multiple of `checkpoint_every`."""
        every = self.config.checkpoint_every
        if self.step // every != (self.step - n_programs) // every:
            self.save(whole=whole)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, by name."""
        return {}

    def state(self, whole: bool) -> dict[str, Any]:
        """Everything else of a checkpoint, as JSON."""
        return {
            "whole": whole,
            "step": self.step,
            "wall_s": self.wall_s,
            "digests": self.digests,
            "best": dataclasses.asdict(self.best) if self.best else None,
            "recent": list(self.recent),
            "observations": self.observations,
            "episode_of": self.episode_of,
            "t_of": self.t_of,
            "environments": self.environments.state_dict(),
            "sizes": self.folder.sizes(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; records written after it are dropped.

        An environment that keeps no state of its own starts a new episode.

        Raises:
            CheckpointError: it is of a run on another table, or of another base.
        """
        check_digests(checkpoint.state.get("digests", {}), self.digests, self.folder.path)
        state = checkpoint.state
        self.step = self.saved_step = state["step"]
        self.wall_s = state["wall_s"]
        self.best = Best(**state["best"]) if state["best"] else None
        self.recent.extend(state["recent"])
        self.observations = self.environments.load_state_dict(state["environments"])
        self.episode_of, self.t_of = state["episode_of"], state["t_of"]
        for row, kept in enumerate(state["environments"]["envs"]):
            if kept is None and self.t_of[row]:
                self.episode_of[row] += 1
                self.t_of[row] = 0
        self.folder.rewind(state["sizes"], self.step)


def check_digests(kept: dict[str, str | None], found: dict[str, str | None], run: Path) -> None:
    """Compare what a run began with and what lies in its place now, as far as both are known.

    Raises:
        CheckpointError: they are not the same.
    """
    for name, digest in found.items():
        began_with = kept.get(name)
        if began_with is not None and digest is not None and began_with != digest:
            raise CheckpointError(
                f"{run}: expected the {name} that the run began with (SHA-256 {began_with[:12]}…), got "
                f"another ({digest[:12]}…); put the former one back in its place, or start a new run"
            )


def go_on(run: Progress) -> list[str]:
    """Restore the newest whole checkpoint; a run that was stopped before its first one starts anew.

    Returns one line for each newer checkpoint that is damaged.

    Raises:
        CheckpointError: there are checkpoints, but none is usable; nothing was changed.
    """
    folder = run.folder
    checkpoint, damaged = latest_checkpoint(folder.checkpoints, whole=True)
    if checkpoint is not None:
        run.restore(checkpoint)
    elif list_checkpoints(folder.checkpoints):
        found = "; ".join(damaged) or "only some that end inside an iteration"
        raise CheckpointError(
            f"{folder.path}: expected a checkpoint to go on from, got none that is usable ({found}); "
            "start again with another --out"
        )
    else:
        folder.rewind({"metrics": 0, "programs": 0}, 0)
    return damaged


class Stopwatch:
    """Seconds since the run began, kept over resumes by its start value."""

    def __init__(self, already_s: float = 0.0) -> None:
        self._start = time.monotonic() - already_s

    def __call__(self) -> float:
        return time.monotonic() - self._start
