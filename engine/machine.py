"""The machine, the versions and the command that something was made with, in one form for every record."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
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


def origin() -> dict[str, Any]:
    """How this process was started, and with what: for the record of a run. Imports nothing heavy."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        **machine("torch", "transformers", "scikit-learn", "numpy"),
    }


def commit() -> str | None:
    """The commit of the checkout that etpo runs from, `+` behind it where files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        told = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5)
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told[0].returncode:
        return None
    return told[0].stdout.strip() + ("+" if told[1].stdout.strip() else "")


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
