"""Steps many environments at once; programs of coding environments run in parallel processes."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

from etpo.envs import answers
from etpo.envs.coding import Coding, Judge, Judged
from etpo.envs.foreign import adapt, is_foreign, make_foreign


@dataclass(frozen=True)
class Transition:
    """One step of one environment.

    Attributes:
        obs: the state that the action led to (of a truncated episode: the one to bootstrap from).
        reward, terminated, truncated, info: as the environment returned them.
        next_obs_after_reset: the state to act on next: `obs`, or the first of a new episode.
    """

    obs: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    next_obs_after_reset: str


class VectorRunner:
    """Steps environments with text observations and actions together, and resets those whose episode ended.

    Coding environments that share a judge have their programs run in one parallel batch; all others are
    stepped one after another.

    Args:
        envs: at least one environment, all different objects.
    """

    def __init__(self, envs: Sequence[gymnasium.Env]) -> None:
        if not envs or len({id(env) for env in envs}) != len(envs):
            raise ValueError(f"envs must be one or more different environments, got {len(envs)}")
        self.envs = list(envs)
        self.observations: list[str] = []

    def reset(self, seed: int | None = None) -> list[str]:
        """Start all episodes; environment i gets seed + i. Returns the observations (`self.observations`).

        EnvironmentFault where one raises, or does not answer as `answers.reset` wants it.
        """
        seeds = [None if seed is None else seed + i for i in range(len(self.envs))]
        self.observations = [answers.reset(env, seed=s) for env, s in zip(self.envs, seeds, strict=True)]
        return list(self.observations)

    def step(self, actions: list[str]) -> list[Transition]:
        """Act in the first environments: `actions[i]` goes to environment i; those without an action wait.

        EnvironmentFault where one raises, or does not answer as `answers.step` wants it.
        """
        if not 1 <= len(actions) <= len(self.envs):
            raise ValueError(
                f"expected 1 to {len(self.envs)} actions, one an environment, got {len(actions)}"
            )
        if not self.observations:
            raise ValueError("call reset or load_state_dict before the first step")
        judged = self._judge(actions)
        transitions = []
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=False)):
            if isinstance(env, Coding):
                result = answers.checked(env, env.finish(action, judged[i]))
            else:
                result = answers.step(env, action)
            obs, reward, terminated, truncated, info = result
            after = answers.reset(env) if terminated or truncated else obs
            transitions.append(Transition(obs, reward, terminated, truncated, info, after))
        self.observations[: len(actions)] = [t.next_obs_after_reset for t in transitions]
        return transitions

    def _judge(self, actions: list[str]) -> dict[int, Judged]:
        """What comes of the coding environments' actions, by environment; one batch for each judge."""
        batches: dict[int, tuple[Judge, list[tuple[int, Coding]]]] = {}
        for i, env in enumerate(self.envs[: len(actions)]):
            if isinstance(env, Coding):
                batches.setdefault(id(env.judge), (env.judge, []))[1].append((i, env))
        found: dict[int, Judged] = {}
        for judge, members in batches.values():
            judged = judge.judge_many([(env.task, actions[i]) for i, env in members])
            found.update(zip((i for i, _ in members), judged, strict=True))
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: each environment's `state_dict`, null for one that has none."""
        return {"envs": [env.state_dict() if hasattr(env, "state_dict") else None for env in self.envs]}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from a `state_dict`; an environment that keeps no state starts a new episode.

        Returns the observations to act on. ValueError where the number of environments differs.
        """
        kept = state["envs"]
        if len(kept) != len(self.envs):
            raise ValueError(f"expected the checkpoint's {len(kept)} environments, got {len(self.envs)}")
        pairs: list[tuple[Any, Any]] = list(zip(self.envs, kept, strict=True))
        self.observations = [
            answers.reset(env) if one is None else env.load_state_dict(one) for env, one in pairs
        ]
        return list(self.observations)

    def close(self) -> None:
        for env in self.envs:
            env.close()


def make_env(spec: str, **kwargs: Any) -> gymnasium.Env:
    """Build an environment from `module:Class`, an id registered with gymnasium, or another package.

    A module is looked for where Python looks, and last in the current folder. Keyword arguments go to the
    class. An environment that is not gymnasium's is taken by its shape (see `etpo.envs.foreign`).

    Raises:
        ValueError: no such module, class, id or package, or what is made has no `reset` and `step`.
    """
    if (foreign := make_foreign(spec, kwargs)) is not None:
        return foreign
    entry_point, own = _entry_point(spec)
    if entry_point is None:
        return gymnasium.make(spec, **kwargs)
    try:
        return adapt(_load_class(entry_point)(**{**own, **kwargs}))
    except TypeError as error:  # an argument that it does not take, or lacks
        raise ValueError(f"cannot make environment {spec!r}: {error}; see --env-arg") from error


def takes(spec: str, parameter: str) -> bool:
    """True where the constructor of an environment names a parameter; see `make_env` for what it raises."""
    entry_point, _ = (None, {}) if is_foreign(spec) else _entry_point(spec)
    if entry_point is None:
        return False
    return parameter in inspect.signature(_load_class(entry_point).__init__).parameters


def _entry_point(spec: str) -> tuple[str | None, dict[str, Any]]:
    """(`module:Class`, its own arguments) of a class that is built here; None for one of gymnasium.make's."""
    if ":" in spec:
        return spec, {}
    try:
        registered = gymnasium.spec(spec)
    except gymnasium.error.Error as error:
        raise ValueError(f"unknown environment {spec!r}: {error}; give an id or module:Class") from error
    if spec.startswith("etpo/"):  # not by gymnasium.make: its wrappers hide `finish` and take our arguments
        assert isinstance(registered.entry_point, str)
        return registered.entry_point, dict(registered.kwargs)
    return None, {}


def _load_class(spec: str) -> Any:
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        env_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative name
        raise ValueError(f"cannot load environment {spec!r}: {error}; expected module:Class") from error
    finally:
        sys.path.remove(here)
    if not callable(env_class):
        raise ValueError(f"{spec!r}: expected a class, got {type(env_class).__name__}; expected module:Class")
    return env_class
