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

import gymnasium
import numpy as np

from etpo.envs.program_repair.tasks import Task, load_tasks
from etpo.envs.prompts import defines, describe_failure, reflection_prompt
from etpo.envs.sandbox import Sandbox, SplitArrays, refuse
from etpo.envs.sandbox.result import Failure, SplitResult
from etpo.envs.text_space import AnyText

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


class ProgramRepair(gymnasium.Env[str, str]):
    """`etpo/ProgramRepair-v0`. One episode: a faulty function of the bundled set, drawn at random.

    State: what the function shall do, an example, the faulty function, and its `def` line again; after an
    attempt that fails a test also that attempt and what is wrong with it. Action: the corrected body, or a
    program that defines the function. Reward: 1 where all hidden tests pass, else minus the share that
    fails; −1 where the program does not run at all. All tests passed terminates; the `max_episode_steps`-th
    attempt truncates. The info of a step has `task`, `passed`, `tests`, `error` and `wall_s`.

    Args:
        max_episode_steps: attempts that end an episode.
        reflection: with False the state after a failure is the first one again.
        sandbox, timeout_s: see `sandbox.Sandbox`. Environments with the same two share one.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self,
        max_episode_steps: int = 5,
        reflection: bool = True,
        sandbox: str = "default",
        timeout_s: float = 10.0,
    ) -> None:
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.max_episode_steps = max_episode_steps
        self.reflection = reflection
        self.tasks = load_tasks()
        self._box: _Box | None = _shared_box(sandbox, timeout_s)
        self._index = 0
        self.prompt = first_prompt(self.tasks[0])
        self.attempts = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode on a random task; returns (prompt, {"task": its name})."""
        super().reset(seed=seed)
        self._index = int(self.np_random.integers(len(self.tasks)))
        self.prompt, self.attempts = first_prompt(self.tasks[self._index]), 0
        return self.prompt, {"task": self.tasks[self._index].name}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._box is None:
            raise ValueError("this environment is closed; make a new one")
        task = self.tasks[self._index]
        verdict = judge(task, action, self._box.sandbox)
        info = {
            "task": task.name,
            "passed": verdict.passed,
            "tests": len(task.tests),
            "error": verdict.error,
            "wall_s": verdict.wall_s,
        }
        if verdict.error is None:
            return self.prompt, verdict.reward, True, False, info
        self.attempts += 1
        if self.reflection:
            task_prompt = first_prompt(task)
            self.prompt = reflection_prompt(task_prompt, body_of(action, task), verdict.error, task.signature)
        return self.prompt, verdict.reward, False, self.attempts >= self.max_episode_steps, info

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "task": self.tasks[self._index].name,
            "prompt": self.prompt,
            "attempts": self.attempts,
            "random": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Go on from a `state_dict`; returns the observation to act on."""
        self._index = [task.name for task in self.tasks].index(state["task"])
        self.prompt, self.attempts = str(state["prompt"]), int(state["attempts"])
        self.np_random.bit_generator.state = state["random"]
        return self.prompt

    def close(self) -> None:
        self._box = None


def first_prompt(task: Task) -> str:
    """The first state of an episode on a task."""
    faulty = "".join(f"# {line}\n" for line in task.faulty.splitlines())
    head = f"# {task.purpose}\n# Example: {task.example}\n# This is wrong:\n{faulty}"
    return f"{head}# Corrected:\n{task.signature}"


def judge(task: Task, action: str, sandbox: Sandbox) -> Verdict:
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


def _run(task: Task, source: str, arguments: Sequence[Any], sandbox: Sandbox) -> SplitResult:
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
        return abs(got - expected) <= TOLERANCE * max(1.0, abs(expected))
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(_equal, got, expected))
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(_equal(got[k], expected[k]) for k in expected)
    return bool(got == expected)


class _Box:
    """A sandbox that lives as long as somebody holds this object."""

    def __init__(self, mode: str, timeout_s: float) -> None:
        self.sandbox = Sandbox(mode, timeout_s)
        weakref.finalize(self, self.sandbox.close)


_boxes: "weakref.WeakValueDictionary[tuple[str, float], _Box]" = weakref.WeakValueDictionary()


def _shared_box(mode: str, timeout_s: float) -> _Box:
    """The box of all open environments with these settings: a warm server each would cost too much."""
    box = _boxes.get((mode, timeout_s))
    if box is None:
        box = _boxes[mode, timeout_s] = _Box(mode, timeout_s)
    return box
