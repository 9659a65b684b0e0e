"""The shape of OpenEnv's clients: `reset` and `step` return observation, reward and `done` in one object."""

import dataclasses
import inspect
import json
from typing import Any, get_args

import gymnasium

from etpo.envs.text_space import AnyText

_OF_ALL = ("done", "reward", "metadata")  # fields of every observation and every action


class OpenEnv(gymnasium.Env[str, str]):
    """An environment behind a client of OpenEnv's shape, asynchronous or not.

    State: the observation's text where that has one field of text that is not empty, else its fields as JSON.
    Action: where the client's class names an action type with one required field, the text is that field's
    value; else the text is read as a JSON object of the action's fields. Text that is none is not sent: the
    next state says so and the reward is 0.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, client: Any) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._action_type = _action_type(client)
        self.inner = client.sync() if inspect.iscoroutinefunction(client.reset) else client

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        result = self.inner.reset(seed=int(self.np_random.integers(2**31)) if seed is None else seed)
        return _text(result.observation), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        try:
            asked = self._asked(action)
        except (ValueError, TypeError, RecursionError) as error:
            told = " ".join(str(error).split())[:300]
            return f"expected an action as a JSON object, got: {told}\n", 0.0, False, False, {}
        result = self.inner.step(asked)
        return _text(result.observation), float(result.reward or 0.0), bool(result.done), False, {}

    def _asked(self, action: str) -> Any:
        """The action to send; ValueError or TypeError where the text is none."""
        if self._action_type is None:
            fields = json.loads(action)
        else:
            required = _required(self._action_type)
            fields = {required[0]: action.strip()} if len(required) == 1 else json.loads(action)
        if not isinstance(fields, dict):
            raise ValueError(f"{type(fields).__name__} in its place")
        return fields if self._action_type is None else self._action_type(**fields)

    def close(self) -> None:
        self.inner.close()


def is_openenv(env: Any) -> bool:
    """True of an object with what every client of OpenEnv defines."""
    return all(
        callable(getattr(env, name, None)) for name in ("reset", "step", "_step_payload", "_parse_result")
    )


def _action_type(client: Any) -> type | None:
    """The first type that the client's class gives its generic base; None where that is a dict, or none."""
    for parent in type(getattr(client, "async_client", client)).__mro__:
        for base in getattr(parent, "__orig_bases__", ()):
            given = get_args(base)[:1]
            if given and isinstance(given[0], type):
                return None if issubclass(given[0], dict) else given[0]
    return None


def _required(action_type: type) -> list[str]:
    """The fields of a pydantic model or a dataclass that have no default."""
    if hasattr(action_type, "model_fields"):
        return [name for name, field in action_type.model_fields.items() if field.is_required()]
    return [
        field.name
        for field in (dataclasses.fields(action_type) if dataclasses.is_dataclass(action_type) else ())
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _text(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    if hasattr(observation, "model_dump"):
        observation = observation.model_dump(mode="json")
    elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        observation = dataclasses.asdict(observation)
    if not isinstance(observation, dict):
        raise ValueError(f"the environment's observation: expected fields, got {type(observation).__name__}")
    fields = {name: value for name, value in observation.items() if name not in _OF_ALL}
    texts = [value for value in fields.values() if isinstance(value, str) and value]
    return texts[0] if len(texts) == 1 else json.dumps(fields, default=str)
