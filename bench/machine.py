"""The machine and versions that a measurement was made on, in one form for every table."""

import importlib.metadata
import os
import platform
import time
from typing import Any

from etpo import __version__


def machine(*packages: str) -> dict[str, Any]:
    """etpo, Python, the versions of `packages`, the processor, the cores that may be used, and the date.

    The version of a package that is not installed is None.
    """
    return {
        "etpo": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def in_words(described: dict[str, Any]) -> str:
    """What `machine` says, and what a benchmark adds to it, as a sentence of text."""
    items = (f"{key} {'not installed' if value is None else value}" for key, value in described.items())
    return "; ".join(items) + "."


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"
