"""What a program sees of the file system, enforced twice: as Landlock rules, which need no rights, and as a
mount namespace that holds nothing else, where the kernel permits one.

In the namespace everything stands as a copy in memory, without access times: reading it brings nothing into
the page cache, leaves no time stamp, and a name that is not there leaves no trace either, so that one split
cannot tell another what it has read. Standard library only.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator

from . import syscalls as kernel
from .readable import Readable

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

# In the view: the private file system is mounted on OWN. A Landlock rule stands on its parent, because a rule
# on a folder does not hold for what is mounted there later. There is no /proc: its counts of who else maps a
# page would let two splits talk.
WRITABLE, OWN = "/box/files", "/box/files/own"
HOME, SHARED_MEMORY = f"{OWN}/home", f"{OWN}/shm"
PRIVATE_MIB, PRIVATE_FILES = 64, 4096
VIEW_MIB = 2048  # at most; the copies take what they need

# Landlock's rights by the version that brought them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_RIGHTS_SINCE = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_NETWORK_SINCE, _NETWORK = 4, 3
_SCOPES_SINCE, _SCOPES = 6, 3  # abstract Unix sockets, signals


def landlock_rules(abi: int, paths: Iterable[str], writable: int, root: int | None = None) -> int:
    """A Landlock ruleset, as a descriptor: read the paths, read and write beneath the folder `writable`.

    Nothing may be executed, and nothing but files, folders, links and pipes be made. On kernels that have it
    (version 6, Linux 6.12), signals and abstract sockets reach only the program's own processes.

    Args:
        root: descriptor of the folder that the paths are beneath, where it is not this process's root.
    """
    handled = 0
    for since, rights in _RIGHTS_SINCE.items():
        handled |= rights if abi >= since else 0
    network = _NETWORK if abi >= _NETWORK_SINCE else 0
    ruleset = kernel.landlock_ruleset(handled, network, _SCOPES if abi >= _SCOPES_SINCE else 0)
    read = _READ_FILE | _READ_DIR
    for path in [*paths, *DEVICES]:
        with contextlib.suppress(FileNotFoundError):
            place = path if root is None else f".{path}"
            fd = os.open(place, os.O_PATH | os.O_CLOEXEC, dir_fd=root)
            rights = read if stat.S_ISDIR(os.fstat(fd).st_mode) else _READ_FILE
            rights |= _WRITE_FILE if path in WRITABLE_DEVICES else 0
            kernel.landlock_allow(ruleset, rights, fd)
            os.close(fd)
    write = handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEVICE)
    kernel.landlock_allow(ruleset, write, writable)
    return ruleset


def build_root(files: Readable, folder: str) -> None:
    """In a new mount namespace: make a root that holds the readable files and nothing else, and enter it.

    Args:
        files: what to show, at the paths that it has outside.
        folder: any empty folder, on which the new root is mounted.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("root", folder, "tmpfs", flags, f"mode=755,size={VIEW_MIB}m,nr_inodes=200k")
    for link in dict.fromkeys(link for root in files.roots for link in _links_on(root)):
        os.makedirs(folder + os.path.dirname(link), exist_ok=True)
        os.symlink(os.readlink(link), folder + link)
    for path in dict.fromkeys(files.files()):
        _copy(path, folder + path)
    for device in DEVICES:
        with contextlib.suppress(FileNotFoundError):
            _show_device(device, folder)
    os.makedirs(folder + OWN)
    for link, target in (("/dev/shm", SHARED_MEMORY), ("/tmp", HOME)):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, folder + link)
    kernel.enter_root(folder)
    kernel.seal_mount("/", recursive=False)


def _links_on(path: str) -> Iterator[str]:
    """Every symbolic link on the way to a path, by its real place; the link that the path itself is, too."""
    at = "/"
    for part in path.strip("/").split("/"):
        at = os.path.join(at, part)
        if os.path.islink(at):
            yield at
            yield from _links_on(os.path.normpath(os.path.join(os.path.dirname(at), os.readlink(at))))
            at = os.path.realpath(at)


def _copy(path: str, target: str) -> None:
    """Copy a file with its time of change, which compiled modules are checked against."""
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a link that leads nowhere, or what this user may not read: programs cannot, either
        return
    try:
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    about = os.fstat(source)
    left = about.st_size
    while left > 0 and (sent := os.sendfile(copy, source, None, left)):
        left -= sent
    os.utime(copy, ns=(about.st_mtime_ns, about.st_mtime_ns))
    os.close(source)
    os.close(copy)


def _show_device(path: str, folder: str) -> None:
    """Bind a device to its own path below the new root."""
    target = folder + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    open(target, "w").close()
    kernel.mount(os.path.realpath(path), target, None, kernel.MS_BIND)
    kernel.seal_mount(target, recursive=True, devices=True)


def furnish_room() -> None:
    """In the mount namespace of a new room: an empty private file system."""
    options = f"mode=755,size={PRIVATE_MIB}m,nr_inodes={PRIVATE_FILES}"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("own", OWN, "tmpfs", flags, options)
    os.mkdir(HOME, 0o700)
    os.mkdir(SHARED_MEMORY, 0o700)
