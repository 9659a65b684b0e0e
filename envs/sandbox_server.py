"""The warm server of the sandbox: imports scikit-learn once, then forks one process for each split.

Started by `Sandbox` as `python -I sandbox_server.py CONTROL_FD FOLDER WORKERS MEMORY_MIB`. It never sees a
validation label, never reads a split's arrays (it passes their descriptor on), and never enters an OpenMP
region, which would not survive a fork. Imports nothing of etpo.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
OWN_PROCESSES = 64  # that one program may have at once, threads included
STRAY_LIMIT_S = 5.0


@dataclass
class Running:
    """One forked split: its job number, its slot (which gives its user), its folder, its start and limit."""

    job: int
    slot: int
    folder: str
    started: float
    deadline: float
    timed_out: bool = False


def refuse_search_estimators(refusal: type[Exception]) -> None:
    """Make `fit` of GridSearchCV and its like raise, for programs that reach them past the syntax check."""
    from sklearn.model_selection import _search, _search_successive_halving

    def fit(self, *args, **kwargs):
        raise refusal(f"{type(self).__name__} is not allowed; choose the hyperparameters and fit one model")

    _search.BaseSearchCV.fit = fit
    _search_successive_halving.BaseSuccessiveHalving.fit = fit


def first_uid() -> int | None:
    """First of this server's user ids, one a slot; None where the server may not change its user.

    Derived from the process id, so that two servers on one machine share none.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        mapped = max(int(start) + int(length) for start, _, length in map(str.split, file))
    wanted = 1_000_000 + 256 * os.getpid()
    return wanted if wanted + 256 < mapped else 20_000 + 256 * os.getpid() % 40_000


def children_of_this_process() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return {int(pid) for pid in file.read().split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        found = set()
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{int(entry)}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.add(int(entry))
        return found


class Server:
    """Forks, watches, kills and reaps. One thread; everything happens in `serve`."""

    def __init__(self, control: socket.socket, folder: str, workers: int, memory_mib: int) -> None:
        self.control = control
        self.folder = folder
        self.uid = first_uid()
        self.free_slots = list(range(workers))
        self.running: dict[int, Running] = {}
        with open("/proc/self/statm") as file:
            own_bytes = int(file.read().split()[0]) * resource.getpagesize()
        self.address_space_bytes = own_bytes + memory_mib * 2**20
        # The limit counts every process of the user: where users are not changed, those that run already too.
        self.processes = OWN_PROCESSES if self.uid is not None else OWN_PROCESSES + _threads_of_user()

    def serve(self) -> None:
        """Work until the trainer hangs up."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._rehearse()
        self.control.send(wire.REPORT.pack(wire.READY, wire.EXITED, 0, 0.0))
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        while True:
            # With no slot free only a hang-up is of interest: jobs wait in the socket.
            poll.register(self.control, select.POLLIN if self.free_slots else 0)
            for fd, event in poll.poll(self._poll_ms()):
                if fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                elif event & (select.POLLHUP | select.POLLERR):
                    return
                else:
                    self._accept()
            self._kill_late()
            for pid in list(self.running):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    self._finish(pid)

    def _rehearse(self) -> None:
        """Confine one child that runs nothing, so that a machine where this fails says so at the start."""
        limits = child.Limits(1.0, self.address_space_bytes, self.processes, self.uid)
        server_pid = os.getpid()
        null = os.open(os.devnull, os.O_RDWR)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child.enter(null, null, self.folder, limits, server_pid)
                code = 0
            except OSError as error:
                code = error.errno or 1
            finally:
                os._exit(code)
        os.close(null)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != 0:
            sys.exit(f"a child cannot be confined: {os.strerror(code) if code > 0 else f'signal {-code}'}")

    def close(self) -> None:
        for pid in self.running:
            _kill_group(pid)
        self.running.clear()
        self._kill_strays(0)
        _remove_folder(self.folder)

    def _poll_ms(self) -> int | None:
        deadlines = [run.deadline for run in self.running.values() if not run.timed_out]
        if not deadlines:
            return None
        return max(0, int(1000 * (min(deadlines) - time.monotonic())) + 1)

    def _accept(self) -> None:
        message, fds, _, _ = socket.recv_fds(self.control, wire.REQUEST.size + wire.MAX_SOURCE_BYTES, 2)
        if not message:
            return
        job, seed, timeout_s = wire.REQUEST.unpack_from(message)
        slot = self.free_slots.pop()
        try:
            self._fork(job, slot, timeout_s, fds, message[wire.REQUEST.size :], seed)
        except OSError:  # no room for a folder or a process: this split fails, the server goes on
            self.free_slots.append(slot)
            self.control.send(wire.REPORT.pack(job, wire.EXITED, 1, 0.0))
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(
        self, job: int, slot: int, timeout_s: float, fds: Sequence[int], source: bytes, seed: int
    ) -> None:
        folder = os.path.join(self.folder, f"{slot}-{job}")
        os.mkdir(folder, 0o700)
        uid = None if self.uid is None else self.uid + slot
        if uid is not None:
            os.chown(folder, uid, uid)
        limits = child.Limits(timeout_s, self.address_space_bytes, self.processes, uid)
        started = time.monotonic()
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                child.enter(*fds, folder, limits, server_pid)
                child.run(source.decode(), seed)
            finally:
                os._exit(1)
        self.running[pid] = Running(job, slot, folder, started, started + timeout_s)

    def _kill_late(self) -> None:
        now = time.monotonic()
        for pid, run in self.running.items():
            if now >= run.deadline and not run.timed_out:
                run.timed_out = True
                _kill_group(pid)

    def _finish(self, pid: int) -> None:
        """Kill what the split left behind, reap it, empty its folder, report, free its slot."""
        run = self.running.pop(pid)
        _kill_group(pid)  # before the reaping: until then nobody else can have this process group
        status = os.waitpid(pid, 0)[1]
        wall_s = time.monotonic() - run.started
        self._kill_strays(run.slot)
        _remove_folder(run.folder)
        if run.timed_out:
            how, value = wire.TIMED_OUT, 0
        elif os.WIFSIGNALED(status):
            how, value = wire.SIGNALLED, os.WTERMSIG(status)
        else:
            how, value = wire.EXITED, os.WEXITSTATUS(status)
        self.free_slots.append(run.slot)
        self.control.send(wire.REPORT.pack(run.job, how, value, wall_s))

    def _kill_strays(self, slot: int) -> None:
        """Kill descendants that left their process group. As their subreaper we inherit every orphan."""
        give_up = time.monotonic() + STRAY_LIMIT_S
        while strays := children_of_this_process() - self.running.keys():
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            for pid in strays:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if self.uid is not None:
                _kill_user(self.uid + slot)
            if time.monotonic() > give_up:
                return
            time.sleep(0.001)


def _kill_user(uid: int) -> None:
    """Kill all processes of one user at once, which a tree that keeps forking cannot outrun."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _kill_group(pid: int) -> None:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _remove_folder(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:  # not empty; its depth and its modes are the program's choice
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, check=False)


def _threads_of_user() -> int:
    count = 0
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry}/task"))
    return count


def main() -> None:
    control_fd, folder, workers, memory_mib = sys.argv[1:]
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # children of the same user cannot read our memory or descriptors
    refuse_search_estimators(child.SearchRefused)
    control = socket.socket(fileno=int(control_fd))
    server = Server(control, folder, int(workers), int(memory_mib))
    try:
        server.serve()
    finally:
        server.close()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import sandbox_warm

    sandbox_warm.warm_up()
    import sandbox_child as child
    import sandbox_wire as wire

    del sys.path[0]
    main()
