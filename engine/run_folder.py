"""What a run leaves on disk: config, metrics, programs, the best program, TensorBoard events."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etpo import EtpoError
from etpo.engine.config import Config, to_toml

METRICS = (
    "reward_mean", "runnable_share", "distinct_share", "kl_ref", "kl_update", "step_share", "entropy",
    "loss_q", "loss_pi", "q_mean", "v_mean", "auc_best", "tokens_per_s", "rss_mib",
)  # fmt: skip


class RunFolderError(EtpoError):
    """The folder cannot be used. `usage` is True where another `--out` or `--resume` mends it."""

    def __init__(self, message: str, *, usage: bool) -> None:
        super().__init__(message)
        self.exit_code = 2 if usage else 1


class RunFolder:
    """Paths and append-only records of one run; two records a line end each file after every iteration.

    Args:
        path: the folder; it must exist (see `create`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.programs_file = path / "programs.jsonl"
        self.origin_file = path / "origin.json"
        self.credit_file = path / "credit.jsonl"
        self.best_file = path / "best_program.py"
        self.report_file = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.reference = path / "reference"
        self.log_file = path / "log.json"
        self.writes_events = True
        self._events: Any = None

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """A new run's folder with its config.toml.

        Raises:
            RunFolderError: not empty, or not writable.
        """
        if path.is_dir() and any(path.iterdir()):
            raise RunFolderError(
                f"--out {path}: expected a new or empty folder, got one with files in it; choose another, or "
                f"continue that run with --resume {path}", usage=True,
            )  # fmt: skip
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            write_atomically(folder.config_file, to_toml(config))
        except OSError as error:
            raise RunFolderError(
                f"--out {path}: expected a folder that can be written, got {error.strerror or error}; "
                "choose another", usage=False,
            ) from None  # fmt: skip
        return folder

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """The folder of a run.

        Raises:
            RunFolderError: there is none.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            found = "a folder without one" if path.is_dir() else "no such folder"
            raise RunFolderError(
                f"{path}: expected the folder of a run (with config.toml), got {found}; "
                "give the folder that `etpo train` named",
                usage=False,
            )
        return folder

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        return f"etpo train --resume {shlex.quote(str(self.path))}"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder while it is written to: two trainings in one folder would mix their records.

        Raises:
            RunFolderError: another process holds it.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(
                    f"{self.path}: expected a run that stands still, got one that another `etpo train` is "
                    "writing to; wait for its end, or stop it",
                    usage=False,
                ) from error
            except OSError:  # some network file systems know no such locks
                pass
            yield
        finally:
            os.close(fd)

    def discard_if_unused(self) -> None:
        """Take away what a run wrote that failed before its first checkpoint, so that the path is free."""
        if not self.checkpoints.exists() and not self.metrics_file.exists():
            for file in (self.config_file, self.origin_file, self.log_file):
                file.unlink(missing_ok=True)
            for model in (self.reference, self.path / ".reference.partial"):
                shutil.rmtree(model, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    @contextlib.contextmanager
    def keeping(self, programs: list[dict[str, Any]]) -> Iterator[None]:
        """Write down the programs of an iteration that fails inside the context: they were executed."""
        try:
            yield
        except Exception:
            self._append_programs(programs)
            raise

    def _append_programs(self, programs: list[dict[str, Any]]) -> None:
        with self.programs_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(clean(record)) + "\n" for record in programs)

    def append(
        self,
        metrics: dict[str, Any],
        programs: list[dict[str, Any]],
        credit: Sequence[dict[str, Any]] = (),
    ) -> None:
        """One iteration's records, flushed."""
        self._append_programs(programs)
        if credit:
            with self.credit_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in credit)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean(metrics)) + "\n")
        for name in METRICS if self.writes_events else ():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                self._writer().add_scalar(name, value, metrics["step"])

    def sizes(self) -> dict[str, int]:
        """Bytes of the record files, for a checkpoint."""
        return {name: file.stat().st_size if file.exists() else 0 for name, file in self._records()}

    def rewind(self, sizes: dict[str, int], step: int) -> None:
        """Drop the records written after a checkpoint."""
        for name, file in self._records():
            if file.exists():
                os.truncate(file, sizes.get(name, 0))
        if self.writes_events:
            self._writer(purge_step=step + 1)

    def _records(self) -> Iterator[tuple[str, Path]]:
        yield "metrics", self.metrics_file
        yield "programs", self.programs_file
        yield "credit", self.credit_file

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _writer(self, purge_step: int | None = None) -> Any:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, needed once a run

            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)
        return self._events


def default_out(config: Config) -> Path:
    """`runs/<dataset>-<algo>-s<seed>-<time>`."""
    name = Path(config.dataset).stem if config.env is None else config.env.replace(":", "-").replace("/", "-")
    return Path("runs") / f"{name}-{config.algo}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def clean(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity become null, so that every JSON reader takes the file."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
