"""The warm server of the sandbox: imports scikit-learn once, then forks one process for each split.

It never sees a validation label, never reads a split's arrays (it passes their descriptor on), and never
enters an OpenMP region, which would not survive a fork. `start.py` runs it.
"""

import contextlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from . import child, confine, rooms, wire
from . import syscalls as kernel
from .files import HOME
from .layers import Layers
from .proc import list_proc, open_proc
from .usage import own_bytes, pid_of, usage_below
from .warm import warm_up

OWN_PROCESSES = 64  # that one program may have at once, threads included
STRAY_LIMIT_S = 5.0
LOOK_EVERY_S = 0.25  # at what the processes of a program take together


@dataclass
class Running:
    """One forked split.

    Attributes:
        job: its number. slot: gives its user. folder, room: where it is.
        started: when, monotonic. timeout_s: processor seconds that it may use.
        deadline: when it has used up the wall-clock time, too. look_at: when to look at what it takes.
        ended: how it was ended by the server, None where it was not.
    """

    job: int
    slot: int
    folder: str
    room: rooms.Room | None
    started: float
    timeout_s: float
    deadline: float
    look_at: float
    ended: int | None = None


def children_of_this_process() -> set[int]:
    try:
        with open_proc(f"self/task/{os.getpid()}/children") as file:
            return {int(pid) for pid in file.read().split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        found = set()
        for entry in list_proc():
            with contextlib.suppress(OSError, ValueError), open_proc(f"{int(entry)}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.add(int(entry))
        return found


class Server:
    """Forks, watches, kills and reaps. One thread; everything happens in `serve`."""

    def __init__(self, control_fd: int, folder: str, workers: int, memory_mib: int, layers: Layers) -> None:
        # Children of the same user cannot read our memory or descriptors. Not earlier: in a user namespace
        # only the rooms of processes can be entered that can be looked into.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        self.control = socket.socket(fileno=control_fd)
        self.folder = folder
        self.layers = layers
        self.workers = workers
        self.free_slots = list(range(workers))
        self.running: dict[int, Running] = {}
        self._parent = -1
        self.memory_bytes = memory_mib * 2**20
        self._measure()

    def _measure(self) -> None:
        """How much of a child's memory comes from this process."""
        with open_proc("self/statm") as file:
            mapped_bytes = int(file.read().split()[0]) * resource.getpagesize()
        self.address_space_bytes = mapped_bytes + self.memory_bytes
        self.shared_bytes = own_bytes("self")

    def rehearse(self) -> None:
        """Confine children that run nothing until one goes well, doing without what cannot be had."""
        while (problem := self._rehearse()) is not None:
            if not self.layers.drop(*problem):
                sys.exit(f"a child cannot be confined: {problem[0]}: {problem[1]}")

    def warm_up(self) -> None:
        """Load the libraries, where possible from what programs see."""
        if self.layers.rooms is not None:
            # The server's own folder is out of sight then, and stays empty; its parent is kept for the end.
            self._parent = os.open(os.path.dirname(self.folder), os.O_PATH | os.O_CLOEXEC)
            self.layers.rooms.enter_view()
        warm_up()
        self._measure()

    def _processes(self) -> int:
        """The limit counts every process of the user: where users are not changed, those that run already."""
        if self.layers.uid is not None:
            return OWN_PROCESSES
        if self.layers.rooms is not None:  # a user namespace counts for itself: inits, porter, server
            return OWN_PROCESSES * self.workers + 2 * self.workers + 16
        return OWN_PROCESSES + _threads_of_user()

    def serve(self) -> None:
        """Work until the trainer hangs up."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        layers = json.dumps({"in_force": self.layers.in_force, "missing": self.layers.missing}).encode()
        self.control.send(wire.REPORT.pack(wire.READY, wire.EXITED, 0, 0.0) + layers)
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
            self._look()
            for pid in list(self.running):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    self._finish(pid)

    def _rehearse(self) -> tuple[str, str] | None:
        """Confine one child that runs nothing. (layer, reason) where a layer could not be put on."""
        read, write = os.pipe2(os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_RDWR)
        folder = os.path.join(self.folder, "rehearsal")
        try:
            pid, room = self._fork(None, 0, 1.0, [null, write], folder)
        except OSError as error:
            return wire.PROCESS_NAMESPACE, error.strerror or str(error)
        finally:
            os.close(null)
            os.close(write)
        with open(read, encoding="utf-8") as file:
            said = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._clear(0, folder, room)
        if said:
            layer, _, reason = said.partition(": ")
            return layer, reason
        if code == -signal.SIGSYS:
            return wire.SECCOMP, "the filter does not fit this processor"
        return None if code == 0 else (wire.LIMITS, f"a rehearsal ended with code {code}")

    def close(self) -> None:
        for pid, run in self.running.items():
            _kill_group(pid)
            os.waitpid(pid, 0)
            if run.room is not None:
                run.room.close()
        self.running.clear()
        self.layers.close()
        self._kill_strays(0)
        if self._parent >= 0:
            os.rmdir(os.path.basename(self.folder), dir_fd=self._parent)
        else:
            _remove_folder(self.folder)

    def _poll_ms(self) -> int | None:
        times = [run.look_at for run in self.running.values() if run.ended is None]
        if not times:
            return None
        return max(0, int(1000 * (min(times) - time.monotonic())) + 1)

    def _accept(self) -> None:
        message, fds, _, _ = socket.recv_fds(self.control, wire.REQUEST.size + wire.MAX_SOURCE_BYTES, 2)
        if not message:
            return
        job, seed, timeout_s = wire.REQUEST.unpack_from(message)
        # By lot: which slots are free first would tell which of two programs ended first.
        slot = self.free_slots.pop(secrets.randbelow(len(self.free_slots)))
        folder = os.path.join(self.folder, f"{slot}-{job}")
        program = (message[wire.REQUEST.size :].decode(), seed)
        try:
            started = time.monotonic()
            pid, room = self._fork(program, slot, timeout_s, fds, folder)
            deadline = started + wire.WALL_CEILING * timeout_s
            look_at = started + min(LOOK_EVERY_S, timeout_s)
            self.running[pid] = Running(job, slot, folder, room, started, timeout_s, deadline, look_at)
        except OSError:  # no room for a folder or a process: this split fails, the server goes on
            self.free_slots.append(slot)
            self.control.send(wire.REPORT.pack(job, wire.EXITED, 1, 0.0))
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(
        self, program: tuple[str, int] | None, slot: int, timeout_s: float, fds: Sequence[int], folder: str
    ) -> tuple[int, rooms.Room | None]:
        """Fork a confined child that runs (source, seed), or only rehearses. Returns its process id and room.

        Args:
            fds: of the arrays, and of the pipe for the result (of a rehearsal: for what went wrong).
            folder: where there are no rooms, what to make as the child's own.
        """
        rooms, uid = self.layers.rooms, self.layers.uid
        uid = None if uid is None else uid + slot
        room = None if rooms is None else rooms.open()
        if room is None:
            os.mkdir(folder, 0o700)
            if uid is not None:
                os.chown(folder, uid, uid)
        ruleset = self.layers.ruleset(folder)
        box = confine.Box(
            timeout_s, self.address_space_bytes, self._processes(), HOME if room else folder, uid,
            room.pidfd if room else None, ruleset, self.layers.filter, self.layers.signals_to_self_only,
        )  # fmt: skip
        server_pid = os.getpid()
        try:
            if rooms is not None and room is not None:
                rooms.enter_next_fork(room)
            pid = os.fork()
            if pid == 0:
                self._forget()
                _be_child(program, (fds[0], fds[1]), box, server_pid)
        except OSError:
            self._clear(slot, folder, room)
            raise
        finally:
            self.layers.give_back(ruleset)
            if rooms is not None:
                rooms.leave()
        return pid, room

    def _forget(self) -> None:
        """In a child: leave nothing of the programs that run beside it, or ran before, for it to look up."""
        self.running.clear()
        self.free_slots.clear()
        self.control.close()

    def _clear(self, slot: int, folder: str, room: rooms.Room | None) -> None:
        """End all that a split, which has been reaped itself, left behind: processes and files."""
        if room is not None:
            room.close()
        else:
            self._kill_strays(slot)
            _remove_folder(folder)

    def _look(self) -> None:
        """End what takes more than it may: time, and memory and processes of all that it has started."""
        now = time.monotonic()
        for pid, run in self.running.items():
            if run.ended is None and now >= run.look_at:
                run.ended = self._judge(pid, run, now)
                if run.ended is not None:
                    _kill_group(pid)

    def _judge(self, pid: int, run: Running, now: float) -> int | None:
        if now >= run.deadline:
            return wire.TIMED_OUT
        roots = [pid] if run.room is None else [pid, pid_of(run.room.pidfd)]
        usage = usage_below(roots, self.shared_bytes, counted=[pid])
        if usage.cpu_s >= run.timeout_s:
            return wire.TIMED_OUT
        if usage.memory_bytes > self.memory_bytes:
            return wire.OUT_OF_MEMORY
        if usage.threads > OWN_PROCESSES:
            return wire.TOO_MANY_PROCESSES
        left_s = max(0.01, run.timeout_s - usage.cpu_s)  # at the least: threads use it up faster
        run.look_at = min(now + min(LOOK_EVERY_S, left_s), run.deadline)
        return None

    def _finish(self, pid: int) -> None:
        """Kill what the split left behind, reap it, empty its folder, report, free its slot."""
        run = self.running.pop(pid)
        _kill_group(pid)  # before the reaping: until then nobody else can have this process group
        status = os.waitpid(pid, 0)[1]
        wall_s = time.monotonic() - run.started
        self._clear(run.slot, run.folder, run.room)
        if run.ended is not None:
            how, value = run.ended, 0
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
            if self.layers.uid is not None:
                _kill_user(self.layers.uid + slot)
            if time.monotonic() > give_up:
                return
            time.sleep(0.001)


def _be_child(
    program: tuple[str, int] | None, fds: tuple[int, int], box: confine.Box, server_pid: int
) -> None:
    try:
        confine.enter(*fds, box, server_pid)
        if program is not None:
            child.run(*program)
        os._exit(0)
    except confine.LayerError as error:
        if program is None:
            # The first step comes before the descriptors have moved.
            fd = fds[1] if error.args[0] == wire.MOUNT_NAMESPACE else confine.RESULT_FD
            os.write(fd, ": ".join(error.args).encode())
    finally:
        os._exit(1)


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
    for entry in list_proc():
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                count += len(list_proc(f"{entry}/task"))
    return count


def prepare() -> None:
    """Before this process makes others: it is to have their orphans, and to end before the rest."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.suppress(OSError), open_proc("self/oom_score_adj", "w") as file:
        file.write("900")  # short of memory, the kernel is to end this and what it forks before the trainer
