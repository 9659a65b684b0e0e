"""Lays the warm server's memory out so that a fork of it copies little. Standard library only.

A fork copies the page tables of all memory that was written to, an entry a page; each page that is written to
later (a reference count is enough) is copied; and at its end a process gives all of that back. So everything
that is written stands in one stretch, which huge pages can hold: 512 entries become one. And each library is
two regions in place of five. All of it is for speed alone: what the C library or the kernel lacks is left.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable

from .proc import open_proc

_MADV_POPULATE_READ, _MADV_COLLAPSE = 22, 25
_HUGE_PAGE_BYTES = 2 * 2**20
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt


def keep_together() -> None:
    """Take large blocks from the heap, too, from now on, which would be mapped for themselves."""
    with contextlib.suppress(AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(option, 2**30)
        mallopt(_M_TOP_PAD, 32 * 2**20)


def allocate_as_usual() -> None:
    """In a child: large blocks are mapped again, and given back when they are freed."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TOP_PAD, 2**17)


def settle() -> None:
    """After all imports, before the first fork."""
    hold_files()
    merge_libraries()
    use_huge_pages()


def hold_files() -> None:
    """Bring all pages of the loaded libraries into memory, and lock them there where that is permitted.

    A page that is absent when a program touches it would be there for the next one, which can tell.
    """
    madvise, mlock = _call("madvise"), _call("mlock")
    for start, end, mode, name in _regions():
        if name.startswith("/") and mode[0] == "r" and mlock(start, end - start, 0) != 0:
            madvise(start, end - start, _MADV_POPULATE_READ)


def merge_libraries() -> None:
    """Give neighbouring regions of a library the same rights, so that the kernel makes one of them.

    What the loader made read-only after it had written to it joins the library's data; tables join the code.
    Programs are native code if they want to: these rights keep nothing from them.
    """
    mprotect = _call("mprotect")
    regions = _regions()
    for (start, end, mode, name), after in zip(regions, [*regions[1:], (0, 0, "", "")], strict=True):
        if name.startswith("/") and mode == "r--p" and ".so" in name:
            is_before_data = after[0] == end and after[2:] == ("rw-p", name)
            added = mmap.PROT_WRITE if is_before_data else mmap.PROT_EXEC
            mprotect(start, end - start, mmap.PROT_READ | added)


def use_huge_pages() -> None:
    """Ask the kernel (6.1 and later; others refuse) to back private memory with 2 MiB pages."""
    madvise = _call("madvise")
    with contextlib.suppress(OSError):
        for start, end, mode, name in _regions():
            if mode == "rw-p" and name in ("", "[heap]"):
                start = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
                for page in range(start, end - _HUGE_PAGE_BYTES + 1, _HUGE_PAGE_BYTES):
                    madvise(page, _HUGE_PAGE_BYTES, _MADV_COLLAPSE)


def _call(name: str) -> Callable[[int, int, int], int]:
    """A function of the C library that takes an address, a number of bytes, and a number."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function: Callable[[int, int, int], int] = kind((name, ctypes.CDLL(None)))
    return function


def _regions() -> list[tuple[int, int, str, str]]:
    """Start, end, rights and file of each region of this process's memory."""
    with open_proc("self/maps") as file:
        lines = [line.split(maxsplit=5) for line in file]
    spans = [(line[0].split("-"), line[1], line[5].strip() if len(line) > 5 else "") for line in lines]
    return [(int(start, 16), int(end, 16), mode, name) for (start, end), mode, name in spans]
