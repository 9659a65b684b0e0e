"""What an environment of a user's own answers, checked: text, a finite reward, truth values, plain info.

An answer of another shape ends the run with one line that names the environment and what it gave, instead of
a first letter for a state, or an error in the middle of writing a record.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from etpo import EtpoError

MOST_REWARD = float(np.finfo(np.float32).max)
# What of a step's info goes into programs.jsonl.
NUMBERS, TEXTS = ("auc_mean", "auc_std", "wall_s"), ("outcome", "error")


class EnvironmentFault(EtpoError, ValueError):
    """An environment raised, or answered something that no learner can use."""


def reset(env: Any, **settings: Any) -> str:
    """The first state of a new episode.

    Raises:
        EnvironmentFault: the environment raised, or did not return (text, info).
    """
    answer = _ask(env, "reset", lambda: env.reset(**settings))
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
        raise _fault(env, "reset", "(text, info)", answer)
    return state_text(env, "reset", answer[0])


def step(env: Any, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """What `env.step(action)` returns, see `checked`."""
    return checked(env, _ask(env, "step", lambda: env.step(action)))


def checked(env: Any, answer: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """A step's answer: the reward as a float, truth values as bools, info that JSON can hold.

    Raises:
        EnvironmentFault: it is not (text, reward, terminated, truncated, info).
    """
    if not (isinstance(answer, tuple) and len(answer) == 5 and isinstance(answer[4], dict)):
        raise _fault(env, "step", "(text, reward, terminated, truncated, info)", answer)
    obs, reward, terminated, truncated, info = answer
    value = _number(reward)
    if value is None or not abs(value) <= MOST_REWARD:
        raise _fault(env, "step", "a reward that is a finite float32", reward)
    for flag in (terminated, truncated):
        if not isinstance(flag, bool | np.bool_):
            raise _fault(env, "step", "terminated and truncated as True or False", flag)
    return state_text(env, "step", obs), value, bool(terminated), bool(truncated), _plain(env, info)


def state_text(env: Any, asked: str, obs: Any) -> str:
    """A state that UTF-8 can hold: halves of surrogate pairs are joined, or replaced."""
    if not isinstance(obs, str):
        raise _fault(env, asked, "a state that is text", obs)
    return whole_text(obs)


def whole_text(text: str) -> str:
    """The text with halves of surrogate pairs joined, and lone ones replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _plain(env: Any, info: dict[str, Any]) -> dict[str, Any]:
    plain = dict(info)
    for name in NUMBERS:
        if info.get(name) is not None:
            plain[name] = _number(info[name])
            if plain[name] is None:
                raise _fault(env, "step", f"info[{name!r}] as a number or None", info[name])
    for name in TEXTS:
        if info.get(name) is not None:
            value = info[name]
            told = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
            plain[name] = whole_text(told)
    return plain


def _number(value: Any) -> float | None:
    """A number of Python, or the one that an array or tensor holds; None for all else, and for NaN."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _ask(env: Any, asked: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except EtpoError:
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise EnvironmentFault(f"environment {_name(env)}: {asked} raised {told}") from error


def _fault(env: Any, asked: str, expected: str, got: Any) -> EnvironmentFault:
    shown = " ".join(f"{type(got).__name__} {got!r}".split())
    shown = shown if len(shown) <= 120 else shown[:119] + "…"
    return EnvironmentFault(f"environment {_name(env)}: expected {asked} to return {expected}, got {shown}")


def _name(env: Any) -> str:
    return type(getattr(env, "unwrapped", env)).__name__
