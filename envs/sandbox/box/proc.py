"""The kernel's files about processes, for a server that sees only what programs see: they have no /proc."""

import os
from typing import IO

PROC_FD = os.open("/proc", os.O_PATH | os.O_CLOEXEC)


def open_proc(path: str, mode: str = "r") -> IO[str]:
    """`open` of a text file beneath /proc."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, dir_fd=PROC_FD))


def list_proc(path: str = ".") -> list[str]:
    """`os.listdir` of a folder beneath /proc."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=PROC_FD)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)
