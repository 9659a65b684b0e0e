"""Kernel calls that Python has no function for. Standard library only; all raise OSError as `os` does."""

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_MOUNT_ATTR_NOATIME, _MOUNT_ATTR_ATIME = 0x10, 0x70  # the second: all bits that say how
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_SECCOMP = 1, 4, 15, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2

# Numbers of system calls that the C library does not wrap; newer ones are the same on every processor.
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


def fork_into(flags: int) -> int:
    """Fork into new namespaces. For a process with one thread; its child must do little and `_exit`."""
    number = _SYS_CLONE.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"clone is not known on {os.uname().machine}")
    syscall = ctypes.PyDLL(None, use_errno=True).syscall  # PyDLL: Python's own lock stays held throughout
    syscall.restype = ctypes.c_long
    return _check(syscall(number, ctypes.c_ulong(flags | signal.SIGCHLD), 0, 0, 0, 0), "clone")


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def seal_mount(target: str, recursive: bool, devices: bool = False) -> None:
    """Make a mount, and those below it, read-only, without access times or set-user-id programs (Linux 5.12).

    Args:
        devices: True leaves device files usable. What is written to a device is not a change of the mount.
    """
    attributes, cleared = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0
    if not devices:  # the access times of a foreign mount are out of a user namespace's reach
        attributes, cleared = attributes | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOATIME, _MOUNT_ATTR_ATIME
    request = struct.pack("<QQQQ", attributes, cleared, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, request, ctypes.c_size_t(len(request))
    )
    _check(result, f"mount_setattr {target}")


def enter_root(folder: str) -> None:
    """Make a mounted folder the root of this mount namespace, and let go of the old one."""
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root is not known on {os.uname().machine}")
    os.chdir(folder)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def prctl(option: int, value: int | bytes, third: object = 0) -> None:
    number = value if isinstance(value, bytes) else ctypes.c_ulong(value)
    _check(_libc.prctl(option, number, third, 0, 0), "prctl")


def drop_capabilities() -> None:
    """Give up every capability of this process, for good."""
    header = struct.pack("<Ii", 0x2008_0522, 0)  # version 3, this process
    _check(_libc.capset(header, bytes(24)), "capset")


def install_filter(instructions: bytes) -> None:
    """Put a seccomp filter, packed `struct sock_filter`s, over this process. Needs no_new_privs."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = Program(len(instructions) // 8, instructions)
    prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def landlock_abi() -> int:
    """The version of Landlock that this kernel has in force. OSError where it has none."""
    return _check(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1), "landlock")


def landlock_ruleset(files: int, network: int, scoped: int) -> int:
    """Descriptor of a new ruleset that handles the given rights (bits; zeros on a kernel without them)."""
    request = struct.pack("<QQQ", files, network, scoped)
    size = 24 if scoped else 16 if network else 8
    result = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, request, ctypes.c_size_t(size), 0)
    return _check(result, "landlock_create_ruleset")


def landlock_allow(ruleset: int, rights: int, fd: int) -> None:
    """Allow rights beneath the file or folder of a descriptor."""
    rule = struct.pack("<Qi", rights, fd)
    _check(_libc.syscall(_SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")


def landlock_restrict(ruleset: int) -> None:
    """Put this process under a ruleset, for good. Needs no_new_privs."""
    _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")


def map_own_ids(uid: int, gid: int) -> None:
    """In a new user namespace: be who one was outside, and nobody else."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
