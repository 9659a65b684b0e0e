"""The bundled set of `ProgramRepair`: small functions with one mistake each, and tests that nobody is shown.

A task in the file: a line that says what the function shall do, an example, the faulty function; behind `---`
its hidden tests, one `arguments -> result` a line. Arguments and results are Python literals. Two empty lines
part the tasks.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TASKS_FILE = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class Task:
    """One function to repair.

    Attributes:
        name: the function's.
        purpose: what it shall do, one line.
        example: a call and its result, which the prompt shows.
        faulty: its source, with the mistake.
        tests: (arguments, result) of each hidden test.
    """

    name: str
    purpose: str
    example: str
    faulty: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]

    @property
    def signature(self) -> str:
        """The line with `def`, its line end included."""
        return self.faulty.splitlines(keepends=True)[0]

    @property
    def example_arguments(self) -> tuple[Any, ...]:
        """Those of the call that the prompt shows."""
        call = self.example.rpartition(" == ")[0]
        return tuple(ast.literal_eval(f"({call.removeprefix(self.name)[1:-1]},)"))


@cache
def load_tasks() -> tuple[Task, ...]:
    """All tasks, in the order of the file."""
    return tuple(map(_task, TASKS_FILE.read_text(encoding="utf-8").strip().split("\n\n\n")))


def _task(text: str) -> Task:
    head, _, tests = text.strip().partition("\n---\n")
    purpose, example, faulty = head.split("\n", 2)
    name = faulty.split("(")[0].removeprefix("def ")
    pairs = []
    for line in tests.splitlines():
        arguments, _, result = line.rpartition(" -> ")
        pairs.append((ast.literal_eval(f"({arguments},)"), ast.literal_eval(result)))
    return Task(name, purpose, example, faulty.rstrip() + "\n", tuple(pairs))
