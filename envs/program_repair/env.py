"""Program repair: the agent corrects a small faulty function, judged by hidden tests.

The box is the one of the data-science programs. A child gets the functions' arguments only; the expected
results stay here, where what the child returns is compared with them. The results come back as text in the
array that the box carries, one row a test, and are read as Python literals; nothing is unpickled.
"""

import ast
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etpo.envs.coding import Coding
from etpo.envs.program_repair.tasks import Task, load_tasks
from etpo.envs.prompts import defines, describe_failure
from etpo.envs.remote import open_runner
from etpo.envs.runner import Runner
from etpo.envs.sandbox import SplitArrays, refuse
from etpo.envs.sandbox.result import Failure, SplitResult

FAILURE_REWARD = -1.0
RESULT_BYTES = 900  # longest text of one result; the box takes at most 1,000 columns
TOLERANCE = 1e-9

# Runs in the box behind the agent's program: the function on each test's arguments, each result as a row of
# bytes behind its length; −1 where it raised. Only plain values of Python's own types are written.
_HARNESS = """

def build_model(x_train, y_train):
    import copy
    import numpy

    plain = (bool, int, float, str, type(None))

    def write(value):
        if type(value) in plain:
            return repr(value)
        if type(value) in (list, tuple):
            inner = [write(item) for item in value]
            if type(value) is list:
                return "[" + ", ".join(inner) + "]"
            return "(" + "".join(item + ", " for item in inner) + ")"
        if type(value) is dict:
            return "{" + ", ".join(write(k) + ": " + write(v) for k, v in value.items()) + "}"
        raise TypeError("the result is of type " + type(value).__name__)

    tests = %(tests)s
    rows = numpy.zeros((len(tests), %(columns)d))
    raised = []
    for row, arguments in zip(rows, tests):
        try:
            text = write(%(name)s(*copy.deepcopy(arguments))).encode()
            if len(text) >= len(row):
                raise ValueError("the result is too long")
            row[0] = len(text)
            row[1 : 1 + len(text)] = list(text)
        except Exception as error:
            row[0] = -1
            raised.append(error)
    if len(raised) == len(tests):
        raise raised[0]

    class Results:
        def predict_proba(self, x):
            return rows

    return Results()
"""


@dataclass(frozen=True)
class Verdict:
    """What came of one attempt.

    Attributes:
        reward: 1 where all hidden tests pass, else minus the share that fails, so that an episode never
            earns more by going on than by the repair; −1 where the program does not run.
        passed: how many pass.
        error: one line for the next prompt; None where all pass.
        wall_s: seconds that it ran.
    """

    reward: float
    passed: int
    error: str | None
    wall_s: float


class ProgramRepair(Coding):
    """`etpo/ProgramRepair-v0`. One episode: a faulty function of the bundled set, drawn at random.

    State: what the function shall do, an example, the faulty function, and its `def` line again; after an
    attempt that fails a test also that attempt and what is wrong with it. Action: the corrected body, or a
    program that defines the function. Reward: 1 where all hidden tests pass, else minus the share that
    fails; −1 where the program does not run at all. All tests passed terminates; the `max_episode_steps`-th
    attempt truncates. The info of a step has `task`, `passed`, `tests`, `error` and `wall_s`.

    Args:
        max_episode_steps, reflection: see `Coding`.
        sandbox, timeout_s, runner: see `remote.open_runner`. Environments with the same three share one.
    """

    def __init__(
        self,
        max_episode_steps: int = 5,
        reflection: bool = True,
        sandbox: str = "default",
        timeout_s: float = 10.0,
        runner: str = "local",
    ) -> None:
        super().__init__(_shared_judge(runner, sandbox, timeout_s), max_episode_steps, reflection)
        self.tasks = load_tasks()
        self.task = self.tasks[0]
        self.prompt = first_prompt(self.task)

    def draw_task(self) -> Task:
        return self.tasks[int(self.np_random.integers(len(self.tasks)))]

    def first_prompt(self, task: Task) -> str:
        return first_prompt(task)

    def shown(self, action: str, task: Task) -> str:
        return body_of(action, task)

    def task_info(self, task: Task) -> dict[str, Any]:
        return {"task": task.name}

    def info_of(self, judged: Verdict, task: Task) -> dict[str, Any]:
        return {
            "task": task.name,
            "passed": judged.passed,
            "tests": len(task.tests),
            "error": judged.error,
            "wall_s": judged.wall_s,
        }

    def task_to_json(self, task: Task) -> str:
        return task.name

    def task_from_json(self, kept: str) -> Task:
        return next(task for task in self.tasks if task.name == kept)

    def close(self) -> None:
        self.judge = _Closed()


def first_prompt(task: Task) -> str:
    """The first state of an episode on a task."""
    faulty = "".join(f"# {line}\n" for line in task.faulty.splitlines())
    head = f"# {task.purpose}\n# Example: {task.example}\n# This is wrong:\n{faulty}"
    return f"{head}# Corrected:\n{task.signature}"


def judge(task: Task, action: str, sandbox: Runner) -> Verdict:
    """Run an attempt on the hidden tests and compare its results with the expected ones.

    Args:
        action: the function's body, or a program that defines the function.
        sandbox: where it runs.
    """
    body = body_of(action, task)
    source = body if defines(body, task.name) else task.signature + body
    above = source.count("\n") - body.count("\n")  # the signature's line, before a bare body
    if (refused := refuse(source)) is not None:
        return _failed(refused[1], above, source, 0.0)
    if (refused := refuse(source + harness_of(task, task.tests))) is not None:  # too long with the tests
        return _failed(refused[1], above, source, 0.0)
    result = _run(task, source, [arguments for arguments, _ in task.tests], sandbox)
    if result.failure is not None:
        # What the hidden tests' arguments led to could hold those: told is what the example leads to.
        shown = _run(task, source, [task.example_arguments], sandbox) if result.outcome == "error" else result
        failure = shown.failure or Failure("error", "it raises an exception on every hidden test")
        return _failed(failure, above, source, result.wall_s)
    if result.proba is None or result.proba.shape != (len(task.tests), RESULT_BYTES):
        return _failed(Failure("error", "the results cannot be read"), above, source, result.wall_s)
    passed = [_is_expected(row, test[1]) for row, test in zip(result.proba, task.tests, strict=True)]
    if all(passed):
        return Verdict(1.0, len(passed), None, result.wall_s)
    failed_share = 1.0 - sum(passed) / len(task.tests)
    raised = sum(row[0] < 0 for row in result.proba)
    error = f"{sum(passed)} of {len(task.tests)} hidden tests pass"
    error += f", {raised} raise an exception" if raised else ""
    return Verdict(-failed_share, sum(passed), error, result.wall_s)


def harness_of(task: Task, tests: Sequence[Any]) -> str:
    """What runs behind the program: the function on the arguments of the tests."""
    return _HARNESS % {"tests": repr(list(tests)), "columns": RESULT_BYTES, "name": task.name}


def _run(task: Task, source: str, arguments: Sequence[Any], sandbox: Runner) -> SplitResult:
    arrays = SplitArrays(np.zeros((2, 1)), np.arange(2), np.zeros((len(arguments), 1)))
    try:
        (result,) = sandbox.run([(source + harness_of(task, arguments), arrays, 0)])
    finally:
        arrays.close()
    return result


def body_of(action: str, task: Task) -> str:
    """The body with its indentation, or the whole program where the action defines the function."""
    text = action if action.endswith("\n") else action + "\n"
    first = next((line for line in text.splitlines() if line.strip()), "")
    if defines(text, task.name) or not first or first[0].isspace():
        return text
    return "".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))


def _failed(failure: Failure, above: int, source: str, wall_s: float) -> Verdict:
    """The verdict on a program that does not run; lines count from the body's first, not in the harness."""
    line = failure.line
    if line is not None:
        line = max(1, line - above) if line <= source.count("\n") + 1 else None
    return Verdict(FAILURE_REWARD, 0, describe_failure(failure.kind, failure.message, line), wall_s)


def _is_expected(row: np.ndarray, expected: Any) -> bool:
    """True where a row of the child's array reads as the expected value. Nothing in it is trusted."""
    length = row[0]
    if not 0 <= length < len(row) or not (np.isin(row[1 : 1 + int(length)], np.arange(256))).all():
        return False
    try:
        got = ast.literal_eval(bytes(row[1 : 1 + int(length)].astype(np.uint8)).decode())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return False
    return _equal(got, expected)


def _equal(got: Any, expected: Any) -> bool:
    """Equal in value and in type, all the way down; numbers with a point within a relative `TOLERANCE`."""
    if type(got) is not type(expected):
        return False
    if isinstance(expected, float):
        return bool(abs(got - expected) <= TOLERANCE * max(1.0, abs(expected)))
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(_equal, got, expected))
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(_equal(got[k], expected[k]) for k in expected)
    return bool(got == expected)


class RepairJudge:
    """Judges attempts in a sandbox that lives as long as somebody holds this object."""

    def __init__(self, runner: str, mode: str, timeout_s: float) -> None:
        self.sandbox = open_runner(runner, mode, timeout_s)
        weakref.finalize(self, self.sandbox.close)

    def judge_many(self, attempts: Sequence[tuple[Task, str]]) -> list[Verdict]:
        return [judge(task, action, self.sandbox) for task, action in attempts]


class _Closed:
    """The judge of an environment that was closed."""

    def judge_many(self, attempts: Sequence[tuple[Task, str]]) -> list[Verdict]:
        raise ValueError("this environment is closed; make a new one")


_judges: "weakref.WeakValueDictionary[tuple[str, str, float], RepairJudge]" = weakref.WeakValueDictionary()


def _shared_judge(runner: str, mode: str, timeout_s: float) -> RepairJudge:
    """The judge of all open environments with these settings: a warm server each would cost too much."""
    found = _judges.get((runner, mode, timeout_s))
    if found is None:
        found = _judges[runner, mode, timeout_s] = RepairJudge(runner, mode, timeout_s)
    return found
