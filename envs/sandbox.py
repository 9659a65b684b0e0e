"""Runs programs that nobody has read: one process for each split of each program, forked from a warm server.

What the box promises, one hostile test each (`tests/envs/test_sandbox.py`):

- A program cannot take the trainer down, nor keep it waiting past the time limit.
- Validation labels never leave the trainer. A child holds the arrays of its own split only, and nothing that
  it sends is unpickled.
- Limits on wall-clock, CPU, address space, file size, open files and processes; afterwards every process that
  descends from the program is killed and its working folder deleted.
- Started by root, each slot runs under a user id of its own, never shared, never `nobody`.

What it does not protect against yet: reading files that the user (or, started by root, everybody) may read,
the data sets among them; network sockets; files left in folders that everybody may write to; filling the disk
with many files. Where the trainer is not root, a program has the trainer's own user, and can signal its
processes.
"""

import ast
import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from etpo.envs import sandbox_wire as wire
from etpo.envs.sandbox_result import Failure, SplitResult, result_of, sent_too_much

SERVER_FILE = Path(__file__).with_name("sandbox_server.py")
PIPE_BYTES = 2**20
MAX_COLUMNS = 1_000


class SandboxError(Exception):
    """The sandbox itself cannot work: its server does not start, or a mode was asked for that it lacks."""


class SplitArrays:
    """The arrays of one split in sealed anonymous memory, for the children that are given its descriptor.

    Args:
        x_train: [n_train, features] float64.
        y_train: [n_train] int64.
        x_val: [n_val, features] float64. There is deliberately no y_val.
    """

    def __init__(self, x_train: np.ndarray, y_train: np.ndarray, x_val: np.ndarray) -> None:
        self.fd = -1
        if x_train.ndim != 2 or x_val.ndim != 2 or y_train.shape != x_train.shape[:1]:
            raise ValueError(
                "expected x_train [n, f], y_train [n], x_val [m, f]; "
                f"got {x_train.shape}, {y_train.shape}, {x_val.shape}"
            )
        self.n_val = x_val.shape[0]
        self.fd = os.memfd_create("split", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(self.fd, "wb", closefd=False) as file:
            file.write(wire.ARRAYS.pack(x_train.shape[0], x_val.shape[0], x_train.shape[1]))
            file.write(np.ascontiguousarray(x_train, np.float64).tobytes())
            file.write(np.ascontiguousarray(y_train, np.int64).tobytes())
            file.write(np.ascontiguousarray(x_val, np.float64).tobytes())
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


@dataclass
class _Job:
    number: int
    source: bytes
    arrays: SplitArrays
    seed: int
    timeout_s: float
    restarted: bool = False
    result_fd: int = -1
    received: bytearray = field(default_factory=bytearray)
    overflowed: bool = False


def refuse(source: str) -> tuple[str, Failure] | None:
    """What is known of a program without running it: (outcome, failure), or None where it may run.

    Refused are the search estimators (`GridSearchCV`, `RandomizedSearchCV`, `HalvingGridSearchCV`: all that
    ends in `SearchCV`), by name, attribute or import. Text that does not parse is an `error`.
    """
    if len(source.encode("utf-8", "surrogatepass")) > wire.MAX_SOURCE_BYTES:
        return "error", Failure("SyntaxError", f"the program is longer than {wire.MAX_SOURCE_BYTES} bytes")
    try:
        source.encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError as error:
        return "error", Failure("SyntaxError", str(error.msg), error.lineno)
    except UnicodeEncodeError:
        return "error", Failure("SyntaxError", "the program is not valid Unicode text")
    except (ValueError, RecursionError, MemoryError):
        return "error", Failure(
            "SyntaxError", "the program cannot be parsed: null bytes or too deeply nested"
        )
    for node in ast.walk(tree):
        names: Iterable[str] = ()
        if isinstance(node, ast.Name):
            names = (node.id,)
        elif isinstance(node, ast.Attribute):
            names = (node.attr,)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = (alias.name for alias in node.names)
        for name in names:
            if name.endswith("SearchCV"):
                message = f"{name} is not allowed; choose the hyperparameters and fit one model"
                return "refused", Failure("refused", message, getattr(node, "lineno", None))
    return None


class Sandbox:
    """Runs jobs (program, arrays of one split, seed), many at once. A context manager; for one thread.

    Args:
        mode: `default`. (`strict` refuses to start while the kernel layers are missing.)
        timeout_s: wall-clock seconds for one split, unless a job gives its own.
        memory_mib: what a program may allocate on top of what the libraries take.
        workers: processes at once; default one for each core this process may use.
    """

    def __init__(
        self,
        mode: str = "default",
        timeout_s: float = 10.0,
        memory_mib: int = 2048,
        workers: int | None = None,
    ) -> None:
        if mode == "strict":
            raise SandboxError(
                "--sandbox strict needs Landlock, seccomp and namespaces; use --sandbox default"
            )
        if mode != "default":
            raise ValueError(f"sandbox must be default or strict, got {mode!r}")
        if not timeout_s > 0 or memory_mib <= 0:
            raise ValueError(f"timeout_s and memory_mib must be positive, got {timeout_s} and {memory_mib}")
        workers = len(os.sched_getaffinity(0)) if workers is None else workers
        if not 1 <= workers <= 256:
            raise ValueError(f"workers must be 1 to 256, got {workers}")
        self.timeout_s = timeout_s
        self.memory_mib = memory_mib
        self.workers = workers
        self._next_number = 0
        self._waiting: deque[_Job] = deque()
        self._sent: dict[int, _Job] = {}
        self._by_fd: dict[int, _Job] = {}
        self._done: deque[tuple[int, SplitResult]] = deque()
        self._closed = False
        self._process: subprocess.Popen | None = None
        self._start()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, source: str, arrays: SplitArrays, seed: int, timeout_s: float | None = None) -> int:
        """Queue one split of one program; returns the job's number. See `wait`.

        Args:
            source: complete source that defines `build_model(x_train, y_train)`; call `refuse` on it before.
            arrays: the split; must stay open until the job is done.
            seed: what `random` and `np.random` are seeded with before the program starts.
        """
        if self._closed:
            raise ValueError("this sandbox is closed; make a new one")
        if len(source.encode()) > wire.MAX_SOURCE_BYTES:
            raise ValueError(
                f"a program must be at most {wire.MAX_SOURCE_BYTES} bytes, got {len(source.encode())}"
            )
        job = _Job(self._next_number, source.encode(), arrays, seed, timeout_s or self.timeout_s)
        self._next_number += 1
        self._waiting.append(job)
        with contextlib.suppress(ConnectionError):  # a dead server is `wait`'s business
            self._send_waiting()
        return job.number

    def wait(self) -> tuple[int, SplitResult]:
        """The next finished job, in the order in which jobs end. ValueError where none is under way."""
        while not self._done:
            if not (self._waiting or self._sent):
                raise ValueError("no job is under way; submit one before waiting")
            try:
                self._send_waiting()
                self._receive()
            except ConnectionError:
                self._server_died()
        return self._done.popleft()

    def run(self, jobs: Iterable[tuple[str, SplitArrays, int]]) -> list[SplitResult]:
        """Run (source, arrays, seed) jobs in parallel; results in the order of submission."""
        numbers = [self.submit(*job) for job in jobs]
        results = dict(self.wait() for _ in numbers)
        return [results[number] for number in numbers]

    def cancel(self) -> None:
        """Drop all that is under way and kill what runs, as after an interrupt. The sandbox stays usable."""
        if self._waiting or self._sent or self._done:
            self._stop()

    def close(self) -> None:
        """Kill what runs and end the server."""
        self._closed = True
        self._stop()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="etpo-sandbox-")
        os.chmod(self._folder, 0o711)  # children pass through it to their own folder
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = os.memfd_create("sandbox-stderr", os.MFD_CLOEXEC)
        self._ready = False
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT"), "1"
        )
        libraries = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        arguments = (theirs.fileno(), self._folder, self.workers, self.memory_mib)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(SERVER_FILE), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", **libraries, **threads},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._poll = select.poll()
        self._poll.register(self._control, select.POLLIN)

    def _stop(self) -> list[_Job]:
        """End the server and forget all jobs; returns those that were sent to it, in order."""
        sent = list(self._sent.values())
        for job in sent:
            self._hang_up(job)
        for jobs in (self._waiting, self._sent, self._by_fd, self._done):
            jobs.clear()
        if self._process is not None:
            if not self._is_ready():
                self._process.kill()  # it has run nothing yet, and would finish its imports first
            self._control.close()  # at which the server kills what runs, removes its folder and ends
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            os.close(self._stderr)
            if os.path.exists(self._folder):  # the server was killed; `rm`, for a tree of any depth
                subprocess.run(["rm", "-rf", "--", self._folder], stderr=subprocess.DEVNULL, check=False)
        return sent

    def _is_ready(self) -> bool:
        """True if the server has reported that it takes jobs, whether or not the report was read."""
        try:
            return self._ready or bool(
                self._control.recv(wire.REPORT.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            )
        except OSError:
            return False

    def _server_died(self) -> None:
        """Start a new server. Jobs that were sent get a second chance, then count as `crashed`."""
        assert self._process is not None
        if not self._is_ready():
            code = self._process.wait(10.0)
            tail = os.pread(self._stderr, 4096, max(0, os.fstat(self._stderr).st_size - 4096))
            self._stop()
            last = tail.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise SandboxError(f"the sandbox's server did not start (exit code {code}): {last}")
        waiting, done = list(self._waiting), list(self._done)
        for job in self._stop():
            if job.restarted:
                failure = Failure("crashed", "the program ended the process that was to run it")
                done.append((job.number, SplitResult("crashed", None, failure, "", 0.0)))
            else:
                again = _Job(job.number, job.source, job.arrays, job.seed, job.timeout_s, restarted=True)
                self._waiting.append(again)
        self._waiting.extend(waiting)
        self._done.extend(done)

    def _send_waiting(self) -> None:
        """Keep the server's socket filled with twice as many jobs as it runs at once, and no more."""
        if self._process is None:
            self._start()
        while self._waiting and len(self._sent) < 2 * self.workers:
            job = self._waiting.popleft()
            job.result_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(job.result_fd, False)
            with contextlib.suppress(OSError):  # over the user's allowance for pipes: a smaller one is slower
                fcntl.fcntl(job.result_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._sent[job.number] = job
            self._by_fd[job.result_fd] = job
            self._poll.register(job.result_fd, select.POLLIN)
            header = wire.REQUEST.pack(job.number, job.seed, job.timeout_s)
            try:
                socket.send_fds(self._control, [header + job.source], [job.arrays.fd, write_fd])
            finally:
                os.close(write_fd)

    def _receive(self) -> None:
        """Wait for the server or a child to say something, and take it in."""
        for fd, _ in self._poll.poll():
            if fd != self._control.fileno():
                if fd in self._by_fd:
                    self._read_some(self._by_fd[fd])
                continue
            report = self._control.recv(wire.REPORT.size)
            if not report:
                raise ConnectionError
            number, how, value, wall_s = wire.REPORT.unpack(report)
            if number == wire.READY:
                self._ready = True
            else:
                job = self._sent.pop(number)
                while self._read_some(job):
                    pass
                self._hang_up(job)
                if job.overflowed and how != wire.TIMED_OUT:
                    result = sent_too_much(wall_s)
                else:
                    result = result_of(bytes(job.received), how, value, wall_s, job.timeout_s)
                self._done.append((number, result))

    def _read_some(self, job: _Job) -> bool:
        """Read once from a job's pipe; False where there is no more now. Who sends too much is hung up on."""
        if job.result_fd < 0:
            return False
        try:
            chunk = os.read(job.result_fd, PIPE_BYTES)
        except BlockingIOError:
            return False
        job.received += chunk
        limit = wire.FRAME.size + 8 * job.arrays.n_val * MAX_COLUMNS + wire.MAX_TEXT_BYTES
        job.overflowed = len(job.received) > limit
        if job.overflowed or not chunk:
            self._hang_up(job)
        return job.result_fd >= 0

    def _hang_up(self, job: _Job) -> None:
        if job.result_fd >= 0:
            self._poll.unregister(job.result_fd)
            del self._by_fd[job.result_fd]
            os.close(job.result_fd)
            job.result_fd = -1
