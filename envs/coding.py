"""Environments in which the agent writes a program, and what comes of running it is the reward.

An episode is a task, a first prompt, and after each program that fails a reflection prompt with the program
and its error. What a kind of task has of its own is a `Judge`, which runs programs, many at once; how a task
is drawn and described; and what a step tells. See docs/environments.md for one on a page.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium

from etpo.envs.prompts import reflection_prompt
from etpo.envs.text_space import AnyText


class Judged(Protocol):
    """What came of one program: its reward, and one line that says what is wrong, None where all is well."""

    @property
    def reward(self) -> float: ...

    @property
    def error(self) -> str | None: ...


class Judge(Protocol):
    """Runs programs for tasks. Environments that share a judge have their programs run in one batch."""

    def judge_many(self, attempts: Sequence[tuple[Any, str]]) -> Sequence[Judged]:
        """What comes of each (task, action), in order."""


class Coding(gymnasium.Env[str, str]):
    """One episode: a task, and attempts until one is right or `max_episode_steps` have failed.

    State: the task's prompt; after an attempt that fails also that attempt and its error. Action: a program,
    or the body of the function that the prompt's last line begins. An attempt without an error terminates the
    episode; the last failure truncates it, and the observation is then still the next prompt.

    `step(action)` is `finish(action, judged)` of what the judge says; who has many environments asks for all
    at once (see `VectorRunner`).

    A subclass gives `draw_task` and `first_prompt`, and where they differ `signature_of`, `shown`, `info_of`
    and, for tasks that JSON cannot hold, `task_to_json` and `task_from_json`.

    Args:
        judge: runs the programs.
        max_episode_steps: failures that end an episode.
        reflection: with False the state after a failure is the first one again: the ablation.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, judge: Judge, max_episode_steps: int = 5, reflection: bool = True) -> None:
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.judge = judge
        self.max_episode_steps = max_episode_steps
        self.reflection = reflection
        self.task: Any = None
        self.prompt = ""
        self.failures = 0

    def draw_task(self) -> Any:
        """The task of a new episode; draws come from `self.np_random`."""
        raise NotImplementedError

    def first_prompt(self, task: Any) -> str:
        """The first state of an episode; its last line is the `def` of the function that is asked for."""
        raise NotImplementedError

    def signature_of(self, task: Any) -> str:
        """The line that a reflection prompt ends with."""
        return self.first_prompt(task).splitlines(keepends=True)[-1]

    def shown(self, action: str, task: Any) -> str:
        """A failed action as the next prompt shows it."""
        return action

    def info_of(self, judged: Any, task: Any) -> dict[str, Any]:
        """The info of a step."""
        return {"error": judged.error}

    def task_info(self, task: Any) -> dict[str, Any]:
        """The info of a reset."""
        return {}

    def task_to_json(self, task: Any) -> Any:
        return task

    def task_from_json(self, kept: Any) -> Any:
        return kept

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.task = self.draw_task()
        self.prompt, self.failures = self.first_prompt(self.task), 0
        return self.prompt, self.task_info(self.task)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        (judged,) = self.judge.judge_many([(self.task, action)])
        return self.finish(action, judged)

    def finish(self, action: str, judged: Judged) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The second half of `step`, for an action that has been judged: what `step` returns."""
        info = self.info_of(judged, self.task)
        if judged.error is None:
            return self.prompt, judged.reward, True, False, info
        self.failures += 1
        first = self.first_prompt(self.task)
        self.prompt = first
        if self.reflection:
            shown = self.shown(action, self.task)
            self.prompt = reflection_prompt(first, shown, judged.error, self.signature_of(self.task))
        return self.prompt, judged.reward, False, self.failures >= self.max_episode_steps, info

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "task": self.task_to_json(self.task),
            "prompt": self.prompt,
            "failures": self.failures,
            "random": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Go on from a `state_dict`; returns the observation to act on."""
        self.task = self.task_from_json(state["task"])
        self.prompt, self.failures = str(state["prompt"]), int(state["failures"])
        self.np_random.bit_generator.state = state["random"]
        return self.prompt
