"""What a program may read: the interpreter, its packages and libraries, and nothing to look labels up in.

The same list is enforced twice: as Landlock rules, which need no rights, and as a mount namespace that holds
nothing else, where the kernel permits one. Standard library only.
"""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import syscalls as kernel

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
FILES = ("/etc/localtime", "/etc/ld.so.cache")

# In the view: the private file system is mounted on OWN. A Landlock rule stands on its parent, because a rule
# on a folder does not hold for what is mounted there later. There is no /proc: its counts of who else maps a
# page would let two splits talk.
WRITABLE, OWN = "/box/files", "/box/files/own"
HOME, SHARED_MEMORY = f"{OWN}/home", f"{OWN}/shm"
PRIVATE_MIB, PRIVATE_FILES = 64, 4096
_EMPTY = "size=4k,nr_inodes=1,mode=755"

# Landlock's rights by the version that brought them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_RIGHTS_SINCE = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_NETWORK_SINCE, _NETWORK = 4, 3
_SCOPES_SINCE, _SCOPES = 6, 3  # abstract Unix sockets, signals


@dataclass(frozen=True)
class Readable:
    """Folders and files that a program may read, and paths beneath them that it may not. All exist."""

    roots: tuple[str, ...]
    hidden: tuple[str, ...]

    def visible(self) -> list[str]:
        """The roots, those with something hidden beneath them replaced by what else they hold."""
        return [path for root in self.roots for path in _without(os.path.realpath(root), self.hidden)]


def readable(also_hidden: Iterable[str]) -> Readable:
    """What the interpreter of this process needs. `also_hidden`: the data home and the like."""
    packages = [folder for folder in sys.path if os.path.isdir(folder)]
    candidates = [*packages, *_standard_library(), *_library_folders(), "/usr/share/zoneinfo", *FILES]
    roots = _outermost(path for path in candidates if os.path.exists(path))
    hidden = {os.path.realpath(path) for path in [*also_hidden, *_label_folders(packages)]}
    for root in roots:
        hidden |= _other_packages(root, packages)
    own = {os.path.realpath(root) for root in roots}
    beneath = (path for path in hidden if os.path.exists(path) and any(_is_under(path, root) for root in own))
    return Readable(tuple(roots), tuple(_outermost(beneath)))


def _standard_library() -> list[str]:
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]


def _library_folders() -> Iterator[str]:
    """Folders of shared libraries: of those that are loaded already, the loader's own, the interpreter's."""
    with open("/proc/self/maps") as file:
        loaded = {line.split(maxsplit=5)[5].strip() for line in file if ".so" in line}
    yield from {os.path.dirname(path) for path in loaded if path.startswith("/")}
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    if sys.base_prefix != "/usr":  # there the loaded libraries have told the folder, which is smaller
        yield f"{sys.base_prefix}/lib"


def _label_folders(packages: Iterable[str]) -> Iterator[str]:
    """etpo's own folders, and the tables that scikit-learn brings along."""
    yield str(Path(__file__).resolve().parents[3])
    for folder in packages:
        yield f"{folder}/etpo"
        for name in ("data", "images", "tests"):
            yield f"{folder}/sklearn/datasets/{name}"


def _other_packages(root: str, packages: Iterable[str]) -> set[str]:
    """Package folders of other interpreters and languages below a root, with tables of their own."""
    real_root, known = Path(os.path.realpath(root)), {os.path.realpath(folder) for folder in packages}
    patterns = ("site-packages", "dist-packages", "python*", "python*/site-packages", "python*/dist-packages")
    found = {str(path) for pattern in (*patterns, "R") for path in real_root.glob(pattern)}
    return {path for path in found if not any(folder == path or _is_under(folder, path) for folder in known)}


def _is_under(path: str, folder: str) -> bool:
    return path != folder and path.startswith(folder.rstrip("/") + "/")


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths that lie in none of the others, without repetition, in order."""
    unique = sorted({os.path.abspath(path) for path in paths})
    return [path for path in unique if not any(_is_under(path, other) for other in unique)]


def _without(path: str, hidden: Iterable[str]) -> Iterator[str]:
    if path in hidden:
        return
    beneath = [one for one in hidden if _is_under(one, path)]
    if not beneath:
        yield path
        return
    with os.scandir(path) as entries:
        names = [entry.path for entry in entries if not entry.is_symlink()]
    for name in names:
        yield from _without(name, beneath)


def landlock_rules(abi: int, paths: Iterable[str], writable: int) -> int:
    """A Landlock ruleset, as a descriptor: read the paths, read and write beneath the folder `writable`.

    Nothing may be executed, and nothing but files, folders, links and pipes be made. On kernels that have it
    (version 6, Linux 6.12), signals and abstract sockets reach only the program's own processes.
    """
    handled = 0
    for since, rights in _RIGHTS_SINCE.items():
        handled |= rights if abi >= since else 0
    network = _NETWORK if abi >= _NETWORK_SINCE else 0
    ruleset = kernel.landlock_ruleset(handled, network, _SCOPES if abi >= _SCOPES_SINCE else 0)
    read = _READ_FILE | _READ_DIR
    for path in [*paths, *DEVICES]:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = read if os.path.isdir(path) else _READ_FILE
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
    kernel.mount("root", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    for entry in os.scandir("/"):
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), folder + entry.path)
    shown = {path for root in files.roots for path in (root, os.path.realpath(root))}
    for path in _outermost(shown):
        if os.path.islink("/" + path.split("/")[1]):  # shown by its real path, which the link leads to
            continue
        _show(path, folder)
        real = os.path.realpath(path)
        for hidden in files.hidden:
            if _is_under(hidden, real):
                _cover(folder + path + hidden[len(real) :])
    for device in DEVICES:
        with contextlib.suppress(FileNotFoundError):
            _show(device, folder, is_device=True)
    os.makedirs(folder + OWN)
    for link, target in (("/dev/shm", SHARED_MEMORY), ("/tmp", HOME)):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, folder + link)
    kernel.enter_root(folder)
    kernel.seal_mount("/", recursive=False)


def _show(path: str, folder: str, is_device: bool = False) -> None:
    """Bind a file or folder to its own path below the new root."""
    target = folder + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        open(target, "w").close()
    kernel.mount(os.path.realpath(path), target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.seal_mount(target, recursive=True, devices=is_device)


def _cover(path: str) -> None:
    if os.path.isdir(path):
        kernel.mount("cover", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, _EMPTY)
        kernel.seal_mount(path, recursive=False)
    else:
        kernel.mount("/dev/null", path, None, kernel.MS_BIND)


def furnish_room() -> None:
    """In the mount namespace of a new room: an empty private file system."""
    options = f"mode=755,size={PRIVATE_MIB}m,nr_inodes={PRIVATE_FILES}"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("own", OWN, "tmpfs", flags, options)
    os.mkdir(HOME, 0o700)
    os.mkdir(SHARED_MEMORY, 0o700)
