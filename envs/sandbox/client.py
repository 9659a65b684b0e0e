"""Runs programs that nobody has read: one process for each split of each program, forked from a warm server.

What the box promises and what it does not protect against: docs/sandbox.md, with the test of each promise.
Each layer is put on where the kernel permits it; `Sandbox.layers` tells which are in force. `strict` refuses
to run with fewer than all, `default` warns once and refuses where programs could reach files or the network,
`off` keeps the limits only and has to be confirmed.
"""

import ast
import contextlib
import fcntl
import json
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

from etpo.envs.sandbox.arrays import SplitArrays
from etpo.envs.sandbox.box import wire
from etpo.envs.sandbox.modes import (
    MODES,
    LayerReport,
    SandboxError,
    ask_for_off,
    check_default,
    check_strict,
    hidden_paths,
    warn_once,
)
from etpo.envs.sandbox.result import Failure, SplitResult, result_of, sent_too_much

SERVER_FILE = Path(__file__).parent / "box" / "start.py"
PIPE_BYTES = 2**20
MAX_COLUMNS = 1_000
MAX_TIMEOUT_S = 86_400.0
MAX_WORKERS = 256


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
    """(`error`, why) of text that cannot be parsed and so need not be run; None of other text."""
    if len(source.encode("utf-8", "surrogatepass")) > wire.MAX_SOURCE_BYTES:
        return "error", Failure("SyntaxError", f"the program is longer than {wire.MAX_SOURCE_BYTES} bytes")
    try:
        source.encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError as error:
        return "error", Failure("SyntaxError", str(error.msg), error.lineno)
    except UnicodeEncodeError:
        return "error", Failure("SyntaxError", "the program is not valid Unicode text")
    except (ValueError, RecursionError, MemoryError):
        return "error", Failure(
            "SyntaxError", "the program cannot be parsed: null bytes or too deeply nested"
        )
    return None


class Sandbox:
    """Runs jobs (program, arrays of one split, seed), many at once. A context manager; for one thread.

    Args:
        mode: `strict` raises SandboxError unless every layer is in force, `default` warns of what is missing,
            `off` keeps the limits only, after consent (see `sandbox_mode.ask_for_off`).
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
        if mode not in MODES:
            raise ValueError(f"sandbox must be one of {', '.join(MODES)}, got {mode!r}")
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}, got {timeout_s}")
        if memory_mib <= 0:
            raise ValueError(f"memory_mib must be positive, got {memory_mib}")
        workers = min(MAX_WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"workers must be 1 to {MAX_WORKERS}, got {workers}")
        if mode == "off":
            ask_for_off()
        self.mode = mode
        self.timeout_s = timeout_s
        self.memory_mib = memory_mib
        self.workers = workers
        self._next_number = 0
        self._waiting: deque[_Job] = deque()
        self._sent: dict[int, _Job] = {}
        self._by_fd: dict[int, _Job] = {}
        self._done: deque[tuple[int, SplitResult]] = deque()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._layers: LayerReport | None = None
        self._start()
        if mode == "strict":
            try:
                self.layers()
            except BaseException:
                self.close()
                raise

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

    def run(
        self, jobs: Iterable[tuple[str, SplitArrays, int]], timeout_s: float | None = None
    ) -> list[SplitResult]:
        """Run (source, arrays, seed) jobs in parallel; results in the order of submission."""
        numbers = [self.submit(*job, timeout_s) for job in jobs]
        results = dict(self.wait() for _ in numbers)
        return [results[number] for number in numbers]

    def layers(self) -> LayerReport:
        """Which layers are around each program. Waits for the server, a few seconds after its start."""
        while self._layers is None:
            try:
                if self._process is None:
                    self._start()
                self._receive()
            except ConnectionError:
                self._server_died()
        return self._layers

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
        memory = {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
        }  # huge pages from the start; see `box/memory.py`
        arguments = (theirs.fileno(), self._folder, self.workers, self.memory_mib, self.mode, *hidden_paths())
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(SERVER_FILE), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={
                "PATH": os.defpath,
                "LANG": "C.UTF-8",
                "CUDA_VISIBLE_DEVICES": "",
                **libraries,
                **threads,
                **memory,
            },
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
                self._take_reports_until_free()
                socket.send_fds(self._control, [header + job.source], [job.arrays.fd, write_fd])
            finally:
                os.close(write_fd)

    def _take_reports_until_free(self) -> None:
        """Read what the server reports while it takes no job: it may be waiting for us to read."""
        both = select.poll()
        both.register(self._control, select.POLLIN | select.POLLOUT)
        while not (event := both.poll()[0][1]) & select.POLLOUT:
            if event & select.POLLIN:
                self._take_report()
            elif event & (select.POLLHUP | select.POLLERR):
                raise ConnectionError

    def _receive(self) -> None:
        """Wait for the server or a child to say something, and take it in."""
        for fd, _ in self._poll.poll():
            if fd != self._control.fileno():
                if fd in self._by_fd:
                    self._read_some(self._by_fd[fd])
                continue
            self._take_report()

    def _take_report(self) -> None:
        """Read one report of the server: that it is ready, or what came of a job."""
        report = self._control.recv(wire.MAX_REPORT_BYTES)
        if not report:
            raise ConnectionError
        number, how, value, wall_s = wire.REPORT.unpack_from(report)
        if number == wire.READY:
            self._take_layers(LayerReport(**json.loads(report[wire.REPORT.size :])))
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

    def _take_layers(self, report: LayerReport) -> None:
        """The server is ready, and has told its layers."""
        self._ready = True
        self._layers = report
        if self.mode == "strict":
            check_strict(report)
        elif self.mode == "default":
            check_default(report)
            warn_once(report)

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
