"""Runs of a comparison: each an `etpo train` of its own process and folder, watched for what it costs.

A finished run is only read. One that was cut goes on from its last checkpoint; where it had none, its folder
is put aside (`….cut-1`) and it is made anew. Beside a run's folder stand its `.usage.jsonl` (when it began
and ended, with the CPU seconds of the process and of its children) and its `.log` (what it printed).
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etpo import EtpoError
from etpo.bench.compare_variants import Settings, Variant, words_of
from etpo.engine.config import OPTIONS, Config, resolve
from etpo.engine.opening import RESUMABLE, placed
from etpo.engine.options import flag
from etpo.engine.run_folder import RunFolder, read_records

Tell = Callable[[str], None]
INTERRUPTED = 130


class ComparisonError(EtpoError):
    """A run that cannot be made, or a folder that holds another one."""

    exit_code = 1


@dataclass(frozen=True)
class Case:
    """One run: what, on what, with which seed, for how many programs."""

    variant: Variant
    dataset: str
    seed: int
    steps: int

    def __str__(self) -> str:
        settings = "".join(f", {name} {value}" for name, value in self.variant.settings)
        return f"{self.dataset}, {self.variant.algo}{settings}, seed {self.seed}"


@dataclass(frozen=True)
class Usage:
    """What a run cost: CPU seconds of its processes and seconds that passed; None where nobody watched.

    `is_estimated` is True where a part was not watched: the watched part a program times all programs.
    """

    cpu_s: float | None
    wall_s: float | None
    is_estimated: bool = False


@dataclass(frozen=True)
class Runs:
    """Where runs are, and how they are made.

    Attributes:
        work: the folder of all runs.
        jobs: processes at a time, each of one thread.
        common: settings of every run.
    """

    work: Path
    jobs: int = 1
    common: Settings = ()
    command: tuple[str, ...] = field(default=(sys.executable, "-P", "-m", "etpo.cli"))

    def path(self, case: Case) -> Path:
        """The folder of a run."""
        data = case.dataset.replace("/", "_").replace(":", "-")
        return self.work / f"{data}-{case.steps}" / f"{case.variant.slug}-s{case.seed}"

    def config(self, case: Case) -> Config:
        """The complete configuration of a run. Raises ValueError for a value that no option takes."""
        return placed(resolve(self.options(case) | {"steps": case.steps}), self.path(case))

    def options(self, case: Case) -> dict[str, Any]:
        """What a run is given but its length and folder; an environment takes a data set's place."""
        own = dict(self.common) | dict(case.variant.settings)
        own |= {} if "env" in own else {"dataset": case.dataset}
        return own | {"seed": case.seed, "algo": case.variant.algo}

    def make(self, cases: Sequence[Case], tell: Tell, done: Callable[[Case], str]) -> dict[Case, str]:
        """Make all runs that are not finished, `jobs` at a time, in the order of `cases`.

        Args:
            tell: called with a line for each run that ended now.
            done: the end of that line.

        Returns:
            for each run that did not reach its end: the last line that it printed.

        Raises:
            ComparisonError: a folder holds a run with other options; nothing was started.
            KeyboardInterrupt: after the running ones have saved.
        """
        cases = list({self.path(case): case for case in cases}.values())
        for case in cases:
            self._check(case)
        waiting = [case for case in cases if self.n_programs(case) < case.steps]
        failures: dict[Case, str] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._run, case): case for case in waiting}
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    case, failure = futures[future], future.result()
                    if failure is not None:
                        failures[case] = failure
                    end = f"failed: {failure}" if failure else done(case)
                    tell(f"[{count}/{len(waiting)}] {case}: {end}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures

    def n_programs(self, case: Case) -> int:
        """Programs that a run has executed and recorded."""
        metrics = read_records(RunFolder(self.path(case)).metrics_file)
        return int(metrics[-1]["step"]) if metrics else 0

    def usage(self, case: Case) -> Usage:
        """What a run cost, from its `.usage.jsonl`."""
        return usage_of(read_records(beside(self.path(case), ".usage.jsonl")), case.steps)

    def _check(self, case: Case) -> None:
        """Refuse a folder whose run had other options."""
        wanted, file = self.config(case), RunFolder(self.path(case)).config_file
        if not file.is_file():
            return
        found = resolve({}, file)
        for name in OPTIONS:
            there, here = getattr(found, name), getattr(wanted, name)
            if name not in (*RESUMABLE, "out") and there != here:
                raise ComparisonError(
                    f"{self.path(case)}: expected a run with {flag(name)} {here}, got one with {there}; take "
                    "another --work, or move that folder away"
                )

    def _run(self, case: Case) -> str | None:
        """Bring one run to its end; None, or the last line of what it said where it failed."""
        path = self.path(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        _wait_until_free(path)
        if self.n_programs(case) >= case.steps:  # somebody else made it meanwhile
            return None
        words = self._words(case, path)
        usage, log = beside(path, ".usage.jsonl"), beside(path, ".log")
        _append(usage, {"event": "began", "programs": self.n_programs(case), "at": time.time()})
        code, cpu_s, wall_s = _watched([*self.command, *words], log)
        ended = {"event": "ended", "programs": self.n_programs(case), "cpu_s": cpu_s, "wall_s": wall_s}
        _append(usage, ended | {"exit_code": code})
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code == 0 and self.n_programs(case) >= case.steps:
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"

    def _words(self, case: Case, path: Path) -> list[str]:
        """The command of a run: a new one, or one that goes on."""
        steps = ["--steps", str(case.steps), "--threads", "1"]
        checkpoints = RunFolder(path).checkpoints
        if checkpoints.is_dir() and any(checkpoints.iterdir()):
            return ["train", "--resume", str(path), *steps]
        if path.exists():
            _put_aside(path)
        return ["train", *words_of(tuple(self.options(case).items())), *steps, "--out", str(path)]


def usage_of(records: list[dict[str, Any]], steps: int) -> Usage:
    """Sum up what was recorded of a run's processes.

    Args:
        records: in their order; a `began` without its `ended` is a process that nobody saw end.
        steps: programs of the whole run.
    """
    cpu_s = wall_s = 0.0
    n_watched = n_unseen = 0
    began: dict[str, Any] | None = None
    for one in records:
        if one["event"] == "began":
            n_unseen += began is not None
            began = one
        elif began is not None:
            cpu_s, wall_s = cpu_s + one["cpu_s"], wall_s + one["wall_s"]
            n_watched += max(0, one["programs"] - began["programs"])
            began = None
    if not n_watched:
        return Usage(None, None)
    n_unseen += began is not None
    if not n_unseen:
        return Usage(cpu_s, wall_s)
    return Usage(cpu_s * steps / n_watched, wall_s * steps / n_watched, True)


def write_readme(work: Path, command: str) -> None:
    """README.md of the work folder: what lies there, and by which commands it came."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "README.md"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else README.splitlines()
    if f"- `{command}`" not in lines:
        lines.append(f"- `{command}`")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


README = """# Runs of comparisons

`DATASET-STEPS/ALGORITHM-OPTION=VALUE…-sSEED/` is the folder of one `etpo train`; seeds from 100 on are
tuning runs, which no table reports. Beside it:

- `….usage.jsonl`: when its processes began and ended, their CPU and wall seconds, programs done by then;
- `….log`: what they printed;
- `….fresh.json`: its best program on split seeds 5–24;
- `….cut-1/`: what a run had drawn that was cut before its first checkpoint.

A command that is given again only reads the runs that are finished, and makes the rest. Made by:
"""


def _watched(command: list[str], log: Path) -> tuple[int, float, float]:
    """Run a command to its end: exit code, CPU seconds of it and its children, seconds that passed."""
    began = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb"},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime, time.monotonic() - began


def _wait_until_free(path: Path) -> None:
    """Wait while another process writes to the folder."""
    if not path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:  # some network file systems know no such locks
        pass
    finally:
        os.close(fd)


def _put_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.cut-{number}")).exists():
        number += 1
    path.rename(aside)


def beside(path: Path, ending: str) -> Path:
    """The file beside a run's folder with its name and an ending."""
    return path.with_name(path.name + ending)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
