"""What a fresh fork of the server does before anything else: it gives up its rights. Standard library only.

See `sandbox/client.py` for what the box promises.
"""

import contextlib
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from . import syscalls as kernel
from . import wire
from .files import HOME, SHARED_MEMORY
from .proc import open_proc
from .seccomp import seccomp_filter

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


def enter(data_fd: int, result_fd: int, box: Box, server_pid: int) -> None:
    """Turn a fresh fork of the server into a confined process. LayerError names what did not work."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError), open_proc("self/oom_score_adj", "w") as file:
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
