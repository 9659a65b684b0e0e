"""What a program may read: the interpreter, five packages and what they need, file by file where possible.

`SHOWN` and their requirements, as their metadata lists the files; the standard library; and the shared
libraries that any of these names. What a program could look labels up in is left out: the tables that
scikit-learn brings along, etpo's own folders, data homes. Standard library only.
"""

import contextlib
import mmap
import os
import re
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SHOWN = ("numpy", "scipy", "pandas", "scikit-learn", "joblib")
FILES = ("/etc/localtime", "/etc/ld.so.cache", "/usr/lib/locale/C.utf8", "/usr/share/zoneinfo")
# Parts of the standard library and of packages that no program needs: large, or tables in disguise.
UNUSED = {
    "dist-packages", "ensurepip", "idlelib", "include", "lib2to3", "site-packages", "test", "tests",
    "tkinter", "turtledemo",
}  # fmt: skip
UNUSED_ENDINGS = (".a", ".c", ".cpp", ".h", ".opt-1.pyc", ".opt-2.pyc", ".pxd", ".pyi", ".pyx")
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SEGMENT, _DYNAMIC_ENTRY = struct.Struct("<IIQQQQQQ"), struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC, _DT_NEEDED, _DT_STRTAB = 1, 2, 1, 5


@dataclass(frozen=True)
class Readable:
    """Folders and files that a program may read, and paths beneath them that it may not. All exist."""

    roots: tuple[str, ...]
    hidden: tuple[str, ...]

    def visible(self) -> list[str]:
        """The roots, those with something hidden beneath them replaced by what else they hold."""
        return [path for root in self.roots for path in _without(os.path.realpath(root), self.hidden)]

    def files(self) -> Iterator[str]:
        """Every file that is shown, by its real path."""
        for root in self.roots:
            yield from self._below(os.path.realpath(root))

    def _below(self, path: str) -> Iterator[str]:
        if path in self.hidden:
            return
        if not os.path.isdir(path):
            if not path.endswith(UNUSED_ENDINGS):
                yield path
            return
        is_tests = os.path.basename(path) == "tests"  # numpy's own tools import _natype.py from there
        with os.scandir(path) as entries:
            for entry in entries:
                if is_tests and not entry.name.startswith("_"):
                    continue
                if entry.name == "tests" or entry.name not in UNUSED:
                    yield from self._below(entry.path)


def readable(also_hidden: Iterable[str]) -> Readable:
    """What programs need of this interpreter and its packages. `also_hidden`: the data home and the like."""
    packages = [folder for folder in sys.path if os.path.isdir(folder)]
    # The base interpreter's folders: `platstdlib` of a virtual environment is its own, and holds no library.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    library = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    library += [folder for folder in packages if folder.startswith(tuple(library))]  # lib-dynload
    library = [folder for folder in library if os.path.basename(folder) not in UNUSED]
    hidden = {os.path.realpath(path) for path in [*also_hidden, *_label_folders(packages)]}
    for folder in library:
        hidden |= {os.path.realpath(f"{folder}/{name}") for name in UNUSED}
    roots = _outermost(path for path in (*library, *FILES) if os.path.exists(path))
    # Without a virtual environment the packages lie in a part of the library that is not shown otherwise.
    shown = {os.path.realpath(root) for root in roots}
    roots += _outermost(
        path
        for path in package_roots(SHOWN)
        if not any(_is_under(os.path.realpath(path), root) for root in shown)
        or any(_is_under(os.path.realpath(path), folder) for folder in hidden)
    )
    own = Readable(tuple(roots), tuple(path for path in hidden if os.path.exists(path)))
    roots += [path for path in needed_libraries(own.files()) if not any(_is_under(path, r) for r in roots)]
    real = {os.path.realpath(root) for root in roots}
    beneath = (path for path in own.hidden if any(_is_under(path, root) for root in real))
    return Readable(tuple(roots), tuple(_outermost(beneath)))


def package_roots(names: Iterable[str]) -> list[str]:
    """Folders and top-level files of distributions and of all that they require, extras apart."""
    roots: set[str] = set()
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # required on other systems only, such as tzdata
            continue
        needs = (need for need in found.requires or () if "extra ==" not in need)
        waiting += [re.split(r"[^\w.-]", need.strip(), maxsplit=1)[0] for need in needs]
        parts = {file.parts[0] if len(file.parts) > 1 else str(file) for file in found.files or ()}
        for part in parts - {"..", "__pycache__"}:
            roots.add(str(found.locate_file(part)))
    return [path for path in sorted(roots) if os.path.exists(path)]


def needed_libraries(files: Iterable[str]) -> list[str]:
    """Paths of the system's shared libraries that the files, the interpreter or those libraries name."""
    with open("/proc/self/maps") as maps:
        loaded = [line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line or "python" in line]
    waiting = [path for path in [*files, *loaded, sys.executable] if path.startswith("/")]
    folders = dict.fromkeys(filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    folders |= dict.fromkeys(os.path.dirname(path) for path in loaded if path.startswith("/"))
    folders |= dict.fromkeys((f"{sys.base_prefix}/lib", "/lib64", "/usr/lib64", "/usr/lib"))
    found = {path for path in loaded if path.startswith("/") and os.path.exists(path)}
    seen: set[str] = set()
    while waiting:
        for name in _names_needed(waiting.pop()):
            if name not in seen:
                seen.add(name)
                places = (f"{folder}/{name}" for folder in folders)
                if (path := next(filter(os.path.exists, places), None)) is not None:
                    found.add(path)
                    waiting.append(path)
    return sorted(found)


def _names_needed(path: str) -> list[str]:
    """The libraries that an ELF file names (DT_NEEDED); none for other files."""
    if not (".so" in path or "/bin/" in path):
        return []
    with contextlib.suppress(OSError, ValueError, struct.error), open(path, "rb") as file:
        if file.read(6) != _ELF64_LITTLE:
            return []
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
            segments = [_SEGMENT.unpack_from(data, start + i * size) for i in range(count)]
            return _dynamic_names(data, segments)
    return []


def _dynamic_names(data: mmap.mmap, segments: list[tuple[int, ...]]) -> list[str]:
    """DT_NEEDED of a mapped file, given its program headers."""
    entries = [
        entry
        for kind, _, offset, _, _, size, _, _ in segments
        if kind == _PT_DYNAMIC
        for entry in _DYNAMIC_ENTRY.iter_unpack(data[offset : offset + size])
    ]
    table = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    for kind, _, offset, address, _, size, _, _ in segments:
        if kind == _PT_LOAD and address <= table < address + size:
            table += offset - address
            break
    starts = [table + value for tag, value in entries if tag == _DT_NEEDED]
    return [data[start : data.find(b"\0", start)].decode() for start in starts]


def _label_folders(packages: Iterable[str]) -> Iterator[str]:
    """etpo's own folders, and the tables that scikit-learn brings along."""
    yield str(Path(__file__).resolve().parents[3])
    for folder in packages:
        yield f"{folder}/etpo"
        for name in ("data", "images", "tests"):
            yield f"{folder}/sklearn/datasets/{name}"


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
