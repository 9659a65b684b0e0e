"""Rooms: for each split a new process namespace and a new mount namespace, with a small trusted init.

A program in a room sees no process but its own, and no file but what `files` shows. When the init is
killed, the kernel kills everything in the room at once, and the private file system goes with it.

The rooms are made by a small process of their own, the porter, forked before the server has imported much,
because a fork of the warm server costs ten times as much. It keeps one room ready. Taking down the mounts of
a room waits for all processors, a few milliseconds on an idle machine and a hundred on a busy one; another
small process, the sexton, does it when the init of the room has ended, and nobody waits for it. Standard
library only.
"""

import contextlib
import os
import select
import signal
import socket
import threading
from itertools import pairwise

from . import files as view
from . import syscalls as kernel
from .proc import PROC_FD
from .readable import Readable

DEATH_LIMIT_MS = 10_000
_MAX_REASON_BYTES = 512


class Room:
    """One room that nobody has entered yet. `pidfd` stands for its init."""

    def __init__(self, pidfd: int) -> None:
        self.pidfd = pidfd

    def close(self) -> None:
        """Kill everything in the room and wait for its end. Reap what was forked into it before."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        end = select.poll()
        end.register(self.pidfd, select.POLLIN)
        end.poll(DEATH_LIMIT_MS)
        os.close(self.pidfd)


class Rooms:
    """The server's end of the porter. `root` and `writable` are descriptors of the view, and of what lies
    above each room's own files.

    Args:
        files: what programs may read.
        folder: an empty folder, over which the porter mounts its root (nobody else sees that).

    Raises:
        OSError: the kernel does not permit such namespaces, or one of the steps failed.
    """

    def __init__(self, files: Readable, folder: str) -> None:
        assert threading.active_count() == 1
        self._own_ns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.root = self.writable = self._view = -1
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _keep_only(theirs.fileno(), PROC_FD)
                _work_as_porter(theirs, files, folder)
            finally:
                os._exit(1)
        theirs.close()
        try:
            self.root, self.writable, self._view = self._receive(3)
        except OSError:
            self.close()
            raise

    def open(self) -> Room:
        """A fresh room."""
        self._socket.send(b"room")
        return Room(self._receive(1)[0])

    def enter_next_fork(self, room: Room) -> None:
        """Let the processes that are forked from now on be in the room's process namespace."""
        kernel.setns(room.pidfd, kernel.CLONE_NEWPID)

    def enter_view(self) -> None:
        """See from now on what programs see, so that the libraries are loaded from the copies in memory."""
        kernel.setns(self._view, kernel.CLONE_NEWNS)

    def leave(self) -> None:
        """Let the next forks be in the server's own process namespace again, where that is permitted.

        In a user namespace it is not: then the server can fork into rooms only, which is all that it does.
        """
        with contextlib.suppress(PermissionError):
            kernel.setns(self._own_ns, kernel.CLONE_NEWPID)

    def close(self) -> None:
        """End the porter; with it all rooms end."""
        self._socket.close()
        kernel.close_all(fd for fd in (self._own_ns, self.root, self.writable, self._view) if fd >= 0)
        os.waitpid(self.pid, 0)

    def _receive(self, count: int) -> list[int]:
        message, fds, _, _ = socket.recv_fds(self._socket, _MAX_REASON_BYTES, count)
        if len(fds) != count:
            kernel.close_all(fds)
            raise OSError(message.decode("utf-8", "replace") or "the process that makes the rooms has ended")
        return fds


def _keep_only(*kept: int) -> None:
    """Close all descriptors but the standard ones and those given."""
    for before, after in pairwise((2, *sorted(kept), os.sysconf("SC_OPEN_MAX"))):
        os.closerange(before + 1, after)


def _work_as_porter(server: socket.socket, files: Readable, folder: str) -> None:
    """Make rooms until the server hangs up."""
    kernel.prctl(kernel.PR_SET_NAME, b"etpo-rooms")
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for an init: the kernel reaps it
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        view.build_root(files, folder)
        root, writable = (os.open(path, os.O_PATH | os.O_CLOEXEC) for path in ("/", view.WRITABLE))
        sexton = _start_sexton()
        next_room = _make_room(sexton)
        socket.send_fds(server, [b"view"], [root, writable, namespace])
        kernel.close_all((root, writable, namespace))
        while server.recv(16):
            socket.send_fds(server, [b"room"], [next_room])
            os.close(next_room)
            next_room = _make_room(sexton)
    except OSError as error:
        reason = f"{error.filename or 'rooms'}: {error.strerror or error}"
        with contextlib.suppress(OSError):
            server.send(reason.encode()[:_MAX_REASON_BYTES])


def _start_sexton() -> socket.socket:
    """Start the process that holds each room's mounts until its init has ended; returns the way to it."""
    porter, sexton = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            _keep_only(sexton.fileno())
            _work_as_sexton(sexton)
        finally:
            os._exit(1)
    sexton.close()
    return porter


def _work_as_sexton(porter: socket.socket) -> None:
    kernel.prctl(kernel.PR_SET_NAME, b"etpo-sexton")
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    mounts_of: dict[int, int] = {}  # pidfd of an init -> its mount namespace
    waiting = select.poll()
    waiting.register(porter, select.POLLIN)
    while True:
        for fd, _ in waiting.poll():
            if fd != porter.fileno():
                waiting.unregister(fd)
                kernel.close_all((fd, mounts_of.pop(fd)))
                continue
            message, fds, _, _ = socket.recv_fds(porter, 16, 2)
            if not message:
                return
            mounts_of[fds[0]] = fds[1]
            waiting.register(fds[0], select.POLLIN)


def _make_room(sexton: socket.socket) -> int:
    """Start the init of a new room; returns its pidfd when the room is furnished."""
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    pid = kernel.fork_into(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
    if pid == 0:
        try:
            _be_init(ready_write)
        finally:
            os._exit(1)
    os.close(ready_write)
    try:
        pidfd = os.pidfd_open(pid)
        reason = os.read(ready_read, _MAX_REASON_BYTES).decode("utf-8", "replace")
    finally:
        os.close(ready_read)
    if reason != "ready":
        os.close(pidfd)
        raise OSError(reason or "the init of a room has ended")
    mounts = os.open(f"{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=PROC_FD)
    socket.send_fds(sexton, [b"room"], [pidfd, mounts])
    os.close(mounts)
    return pidfd


def _be_init(ready: int) -> None:
    """Furnish the room, then reap orphans until killed. Signals from inside the room do not reach an init."""
    kernel.prctl(kernel.PR_SET_NAME, b"etpo-init")
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        view.furnish_room()
    except OSError as error:
        os.write(ready, f"{error.filename or 'room'}: {error.strerror or error}".encode())
        return
    os.write(ready, b"ready")
    os.closerange(0, 256)
    while True:
        signal.pause()
