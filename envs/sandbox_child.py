"""What one sandbox process does after the fork: give up its rights, run the program, write the result.

Loaded by the server by path; imports nothing of etpo. See `sandbox.py` for what the box promises.
"""

import contextlib
import ctypes
import io
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass

import joblib
import numpy as np
import sandbox_wire as wire

PROGRAM_NAME = "<program>"
DATA_FD, RESULT_FD, FIRST_FREE_FD = 3, 4, 5
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_FILE_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """What a child may use. `uid` is None where the server is not root: the child then keeps its user."""

    timeout_s: float
    address_space_bytes: int
    processes: int
    uid: int | None


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


def enter(data_fd: int, result_fd: int, folder: str, limits: Limits, server_pid: int) -> None:
    """Turn a fresh fork of the server into a confined process: session, descriptors, limits, user, folder.

    A further layer (Landlock, seccomp) belongs at the end of this function.
    """
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _keep_descriptors(data_fd, result_fd)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    cpu_s = int(limits.timeout_s) + 2  # one second before the hard limit comes SIGXCPU, which says what it is
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for what, value in (
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    os.umask(0o077)
    os.chdir(folder)
    for name in ("HOME", "TMPDIR", "SCIKIT_LEARN_DATA"):
        os.environ[name] = folder
    tempfile.tempdir = None
    if limits.uid is not None:
        os.setgroups([])
        os.setresgid(limits.uid, limits.uid, limits.uid)
        os.setresuid(limits.uid, limits.uid, limits.uid)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server_pid:
        os._exit(1)


def _keep_descriptors(data_fd: int, result_fd: int) -> None:
    """Leave /dev/null as 0, 1, 2 and the two given descriptors as 3 and 4; close all others."""
    null = os.open(os.devnull, os.O_RDWR)
    high = 1 + max(null, data_fd, result_fd, FIRST_FREE_FD)
    os.dup2(data_fd, high)
    os.dup2(result_fd, high + 1)
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.dup2(high, DATA_FD, inheritable=False)
    os.dup2(high + 1, RESULT_FD, inheritable=False)
    os.closerange(FIRST_FREE_FD, os.sysconf("SC_OPEN_MAX"))


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
