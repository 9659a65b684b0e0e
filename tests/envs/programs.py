"""Programs for the sandbox's tests, and looking at processes."""

import os
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path


def program(body: str) -> str:
    """A whole program from the body of `build_model`, whose first line is line 2."""
    inner = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return f"def build_model(x_train, y_train):\n{inner}\n"


FIT = program("""
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression().fit(x_train, y_train)
""")
SLEEP = program("import time\ntime.sleep(600)")


def is_gone(pid: int) -> bool:
    """No such process, or one that has ended and only waits to be reaped by its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def make_passable(folder: Path) -> None:
    """Let other users pass through a test's folder, so that only the sandbox keeps its programs out."""
    for one in (folder, *folder.parents[:3]):
        if one == Path(tempfile.gettempdir()) or one.stat().st_uid != os.getuid():
            break
        one.chmod(one.stat().st_mode | 0o055)


def wait_until(condition: Callable[[], object], limit_s: float = 60.0) -> bool:
    """Wait for a condition; False where it does not come within the limit."""
    give_up = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True
