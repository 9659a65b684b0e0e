"""The shape of TRL's `environment_factory`: an object with `reset`, `reward`, and methods that are tools."""

import inspect
import json
from collections.abc import Callable
from typing import Any

import gymnasium

from etpo.envs.text_space import AnyText

MAX_TURNS = 8


class Tools(gymnasium.Env[str, str]):
    """An object whose public methods are tools, as an environment.

    State: what `reset` told, the tools with their docstrings, and all that was said since. Action: text with
    a call in it, `{"name": …, "arguments": {…}}`; where there is one tool with one parameter, any other text
    is its argument. An action without a call ends the episode, as does the object's `done` where it has one;
    the `MAX_TURNS`-th action truncates it. What a tool raises is told as its answer. Rewards are the changes
    of the object's `reward`, which add up to what it is in the end; ValueError where it has none.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, inner: Any) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.inner = inner
        self.tools = tools_of(inner)
        self._told: list[str] = []
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        first = self.inner.reset()
        if not hasattr(self.inner, "reward"):
            raise ValueError(f"expected a `reward` of {type(self.inner).__name__} after reset, got none")
        self._turns = 0
        described = [
            f"{name}{inspect.signature(tool)}\n{inspect.getdoc(tool) or ''}".rstrip()
            for name, tool in self.tools.items()
        ]
        self._told = [*([str(first)] if first else []), "Tools:", *described]
        return self._state(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        before = float(self.inner.reward or 0.0)
        self._turns += 1
        call = self._call(action)
        self._told += [action.rstrip("\n")]
        if call is not None:
            self._told += [self._answer(*call)]
        ended = call is None or bool(getattr(self.inner, "done", False))
        late = not ended and self._turns >= MAX_TURNS
        return self._state(), float(self.inner.reward or 0.0) - before, ended, late, {}

    def _state(self) -> str:
        return "\n".join(self._told) + "\n"

    def _call(self, action: str) -> tuple[str, dict[str, Any]] | None:
        """The name and the arguments of the first call in a text; None where there is none."""
        start = action.find("{")
        while start >= 0:
            try:
                found, _ = json.JSONDecoder().raw_decode(action, start)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict) and isinstance(found.get("name"), str):
                arguments = found.get("arguments", {})
                return found["name"], arguments if isinstance(arguments, dict) else {}
            start = action.find("{", start + 1)
        if len(self.tools) == 1:
            ((name, tool),) = self.tools.items()
            parameters = list(inspect.signature(tool).parameters)
            if len(parameters) == 1:
                return name, {parameters[0]: action.strip()}
        return None

    def _answer(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self.tools:
            return f"expected one of {', '.join(self.tools)}, got {name}"
        try:
            return str(self.tools[name](**arguments))
        except Exception as error:  # a tool says so that an action is wrong, or that all is over
            return str(error) or type(error).__name__


def tools_of(env: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object but `reset`, by name."""
    methods = inspect.getmembers(env, inspect.ismethod)
    return {name: method for name, method in methods if name != "reset" and not name.startswith("_")}


def is_tools(env: Any) -> bool:
    """True of an object with `reset` and tools, but no `step`."""
    has_reset = callable(getattr(env, "reset", None)) and not hasattr(env, "step")
    return has_reset and bool(tools_of(env))
