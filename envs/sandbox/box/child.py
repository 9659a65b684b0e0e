"""What one sandbox process does after the fork: give up its rights, run the program, write the result.

Loaded by the server by path; imports nothing of etpo. See `sandbox.py` for what the box promises.
"""

import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import joblib
import numpy as np

from . import syscalls as kernel
from . import wire
from .files import HOME, SHARED_MEMORY
from .seccomp import seccomp_filter

PROGRAM_NAME = "<program>"
DATA_FD, RESULT_FD, RULESET_FD, FIRST_FREE_FD = 3, 4, 5, 6
MAX_FILE_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Box:
    """What is put around one child. None stands for a layer that this machine does not permit.

    Attributes:
        folder: the child's own folder; in a room it is `files.HOME`.
        uid: the user to become; None: the child keeps the server's.
        room: the pidfd of the init whose mount namespace is to be entered.
        ruleset: descriptor of the Landlock rules.
        filter: the seccomp filter, as packed instructions.
        signals_to_self_only: let the seccomp filter refuse signals to other processes, too.
    """

    timeout_s: float
    address_space_bytes: int
    processes: int
    folder: str
    uid: int | None = None
    room: int | None = None
    ruleset: int | None = None
    filter: bytes | None = None
    signals_to_self_only: bool = False


class LayerError(Exception):
    """A layer could not be put on. Arguments: its name, and the reason in words."""


class SearchRefused(Exception):
    """Raised by the `fit` of a search estimator that was reached past the syntax check."""


class _Invalid(Exception):
    """The program ran, but what it returned cannot be read as probabilities."""


class _CutText(io.TextIOBase):
    """A text sink that keeps the first characters and drops the rest, so that a flood costs nothing."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(self._parts[-1])
        return len(text)

    def text(self) -> str:
        return "".join(self._parts)


def enter(data_fd: int, result_fd: int, box: Box, server_pid: int) -> None:
    """Turn a fresh fork of the server into a confined process. LayerError names what did not work."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if box.room is not None:
        with _layer(wire.MOUNT_NAMESPACE):
            kernel.setns(box.room, kernel.CLONE_NEWNS)
    with _layer(wire.LIMITS):
        _keep_descriptors(data_fd, result_fd, box.ruleset)
        _limit(box)
        _move_in(box)
    if box.uid is not None:
        with _layer(wire.OWN_USER):
            os.setgroups([])
            os.setresgid(box.uid, box.uid, box.uid)
            os.setresuid(box.uid, box.uid, box.uid)
    with _layer(wire.NO_NEW_PRIVILEGES):
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != (server_pid if box.room is None else 0):  # 0: a parent outside the room
            os._exit(1)
    if box.ruleset is not None:
        with _layer(wire.LANDLOCK):
            kernel.landlock_restrict(RULESET_FD)
            os.close(RULESET_FD)
    if box.filter is not None:
        with _layer(wire.SECCOMP):
            only = os.getpid() if box.signals_to_self_only else None
            program = box.filter if only is None else seccomp_filter(os.uname().machine, only)
            kernel.install_filter(program)


@contextlib.contextmanager
def _layer(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise LayerError(name, getattr(error, "strerror", None) or str(error)) from error


def _limit(box: Box) -> None:
    cpu_s = int(box.timeout_s) + 2  # one second before the hard limit comes SIGXCPU, which says what it is
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for what, value in (
        (resource.RLIMIT_AS, box.address_space_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NPROC, box.processes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _move_in(box: Box) -> None:
    """Make the own folder the working folder, and the place for temporary files."""
    os.umask(0o077)
    if box.room is not None and box.uid is not None:
        for folder in (HOME, SHARED_MEMORY):
            os.chown(folder, box.uid, box.uid)
    os.chdir(box.folder)
    for name in ("HOME", "TMPDIR", "SCIKIT_LEARN_DATA"):
        os.environ[name] = box.folder
    tempfile.tempdir = None


def _keep_descriptors(data_fd: int, result_fd: int, ruleset_fd: int | None) -> None:
    """Leave /dev/null as 0, 1, 2 and the given descriptors as 3, 4 and 5; close all others."""
    null = os.open(os.devnull, os.O_RDWR)
    given = [data_fd, result_fd, *([] if ruleset_fd is None else [ruleset_fd])]
    high = 1 + max(null, FIRST_FREE_FD, *given)
    for i, fd in enumerate(given):
        os.dup2(fd, high + i)
    for target in (0, 1, 2):
        os.dup2(null, target)
    for i in range(len(given)):
        os.dup2(high + i, DATA_FD + i, inheritable=False)
    os.closerange(DATA_FD + len(given), os.sysconf("SC_OPEN_MAX"))


def read_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_train [n_train, features] float64, y_train [n_train] int64, x_val [n_val, features] float64."""
    size = os.fstat(DATA_FD).st_size
    # pread: the descriptor's offset is shared with the children that read the same split.
    buffer = bytearray(os.pread(DATA_FD, size, 0))
    os.close(DATA_FD)
    n_train, n_val, features = wire.ARRAYS.unpack_from(buffer)
    start = wire.ARRAYS.size
    x_train = np.frombuffer(buffer, np.float64, n_train * features, start).reshape(n_train, features)
    start += x_train.nbytes
    y_train = np.frombuffer(buffer, np.int64, n_train, start)
    start += y_train.nbytes
    x_val = np.frombuffer(buffer, np.float64, n_val * features, start).reshape(n_val, features)
    return x_train, y_train, x_val


def run(source: str, seed: int) -> None:
    """Run the program on the arrays at `DATA_FD`, write one frame to `RESULT_FD`, end the process."""
    own_pid = os.getpid()
    kernel.prctl(kernel.PR_SET_NAME, b"etpo-split")
    out = _CutText(wire.MAX_STDOUT_BYTES)
    sys.stdout = sys.stderr = out
    code = 0
    try:
        frame = _outcome(source, seed, out)
    except MemoryError:
        frame, code = b"", wire.EXIT_NO_MEMORY
    if os.getpid() != own_pid:  # a process that the program forked came back from build_model
        os._exit(0)
    view = memoryview(frame)
    try:
        while view:
            view = view[os.write(RESULT_FD, view) :]
    except OSError:
        code = 1
    os._exit(code)


def _outcome(source: str, seed: int, out: _CutText) -> bytes:
    empty = np.empty((0, 0))
    try:
        proba = _probabilities(source, seed)
    except MemoryError:
        return _frame(wire.MEMORY, empty, out)
    except SearchRefused as refused:
        return _frame(wire.REFUSED, empty, out, "refused", str(refused), _program_line(refused))
    except _Invalid as invalid:
        return _frame(wire.INVALID_OUTPUT, empty, out, "invalid output", str(invalid))
    except BaseException as exception:  # SystemExit and KeyboardInterrupt are the program's own doing here
        kind, message = type(exception).__name__, _message(exception)
        return _frame(wire.ERROR, empty, out, kind, message, _program_line(exception))
    return _frame(wire.OK, proba, out)


def _probabilities(source: str, seed: int) -> np.ndarray:
    x_train, y_train, x_val = read_arrays()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what random_state=None in scikit-learn reads
    warnings.simplefilter("ignore")
    space: dict = {"__name__": "program"}
    # Sequential: a worker process could not import anything after the user change, and costs more than a fit.
    with joblib.parallel_config(backend="sequential"), np.errstate(all="ignore"):
        exec(compile(source, PROGRAM_NAME, "exec", dont_inherit=True), space)
        model = space["build_model"](x_train, y_train)
        if model is None:
            raise TypeError("build_model returned None; it must return the fitted classifier")
        if not hasattr(model, "predict_proba"):
            raise AttributeError(
                f"{type(model).__name__} has no predict_proba; return a classifier that has it"
            )
        returned = model.predict_proba(x_val)
    try:
        proba = np.ascontiguousarray(returned, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _Invalid("predict_proba did not return an array of numbers") from error
    if proba.ndim != 2:
        raise _Invalid(f"predict_proba returned {proba.ndim} dimensions, expected 2 (rows, classes)")
    return proba


def _frame(
    outcome: int, proba: np.ndarray, out: _CutText, kind: str = "", message: str = "", line: int = 0
) -> bytes:
    texts = [
        text.encode("utf-8", "replace")[:limit]
        for text, limit in (
            (kind, wire.MAX_KIND_BYTES),
            (message, wire.MAX_MESSAGE_BYTES),
            (out.text(), wire.MAX_STDOUT_BYTES),
        )
    ]
    sizes = (*proba.shape, *(len(text) for text in texts))
    return wire.FRAME.pack(wire.MAGIC, outcome, line, *sizes) + proba.tobytes() + b"".join(texts)


def _message(exception: BaseException) -> str:
    if isinstance(exception, SyntaxError):
        return str(exception.msg)
    try:
        return str(exception)
    except BaseException:
        return ""


def _program_line(exception: BaseException) -> int:
    """The line of the program's source where the exception came from, 0 where there is none."""
    if isinstance(exception, SyntaxError) and exception.filename == PROGRAM_NAME:
        return exception.lineno or 0
    line = 0
    for frame, frame_line in traceback.walk_tb(exception.__traceback__):
        if frame.f_code.co_filename == PROGRAM_NAME:
            line = frame_line
    return line
