"""Steps many environments at once; programs of data-science environments run in parallel processes."""

import importlib
import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

from etpo.envs.data_science import DataScience
from etpo.envs.scoring import Score, Scorer


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

    Data-science environments that share a scorer have their actions scored in one parallel batch; all others
    are stepped one after another.

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

        ValueError where one is no text.
        """
        seeds = [None if seed is None else seed + i for i in range(len(self.envs))]
        self.observations = [_text(env.reset(seed=s)[0]) for env, s in zip(self.envs, seeds, strict=True)]
        return list(self.observations)

    def step(self, actions: list[str]) -> list[Transition]:
        """Act in the first environments: `actions[i]` goes to environment i; those without an action wait.

        ValueError where an observation is no text, or a reward not finite.
        """
        if not 1 <= len(actions) <= len(self.envs):
            raise ValueError(
                f"expected 1 to {len(self.envs)} actions, one an environment, got {len(actions)}"
            )
        if not self.observations:
            raise ValueError("call reset or load_state_dict before the first step")
        scores = self._score(actions)
        transitions = []
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=False)):
            result = env.finish(action, scores[i]) if isinstance(env, DataScience) else env.step(action)
            obs, reward, terminated, truncated, info = result
            if not math.isfinite(reward):
                raise ValueError(f"the environment's reward: expected a finite number, got {reward}")
            after = env.reset()[0] if terminated or truncated else obs
            transitions.append(
                Transition(_text(obs), float(reward), bool(terminated), bool(truncated), info, _text(after))
            )
        self.observations[: len(actions)] = [t.next_obs_after_reset for t in transitions]
        return transitions

    def _score(self, actions: list[str]) -> dict[int, Score]:
        """Scores of the data-science environments' actions, by environment; one batch for each scorer."""
        batches: dict[int, tuple[Scorer, list[int]]] = {}
        for i, env in enumerate(self.envs[: len(actions)]):
            if isinstance(env, DataScience):
                batches.setdefault(id(env.scorer), (env.scorer, []))[1].append(i)
        scores: dict[int, Score] = {}
        for scorer, members in batches.values():
            scores.update(zip(members, scorer.score_many([actions[i] for i in members]), strict=True))
        return scores

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
            env.reset()[0] if one is None else env.load_state_dict(one) for env, one in pairs
        ]
        return list(self.observations)

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _text(obs: Any) -> str:
    if not isinstance(obs, str):
        raise ValueError(
            f"the environment's observation: expected text, got {type(obs).__name__}; etpo learns in "
            "environments with text in and text out"
        )
    return obs


def make_env(spec: str, **kwargs: Any) -> gymnasium.Env:
    """Build an environment from `module:Class`, or from an id registered with gymnasium.

    A module is looked for where Python looks, and last in the current folder. Keyword arguments go to the
    class.

    Raises:
        ValueError: no such module, class or id, or the class is no gymnasium environment.
    """
    entry_point, own = _entry_point(spec)
    if entry_point is None:
        return gymnasium.make(spec, **kwargs)
    return _load_class(entry_point)(**{**own, **kwargs})


def takes(spec: str, parameter: str) -> bool:
    """True where the constructor of an environment names a parameter; see `make_env` for what it raises."""
    entry_point, _ = _entry_point(spec)
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


def _load_class(spec: str) -> type[gymnasium.Env]:
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        env_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative name
        raise ValueError(f"cannot load environment {spec!r}: {error}; expected module:Class") from error
    finally:
        sys.path.remove(here)
    if not (isinstance(env_class, type) and issubclass(env_class, gymnasium.Env)):
        raise ValueError(f"{spec!r} is not a gymnasium.Env class; derive it from gymnasium.Env")
    return env_class
