"""Other people's environments, by their shape: whatever is reset and stepped with text learns here.

`gem:ID`, `reasoning-gym:TASK` and `textarena:ID` are made by those packages (see `INSTALL`). Any other object
is taken whose `reset` and `step` return what gymnasium's, GEM's, older gym's, TextArena's or OpenEnv's do, or
whose methods are tools, as TRL's are.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import gymnasium

from etpo.envs.openenv import OpenEnv, is_openenv
from etpo.envs.text_space import AnyText
from etpo.envs.tools import Tools, is_tools

Step = tuple[str, float, bool, bool, dict[str, Any]]

_EXTRA = "install it with pip install 'etpo[envs]'"
INSTALL = {
    "reasoning-gym": _EXTRA,
    "textarena": _EXTRA,
    # It demands versions that the others cannot live with, and needs them for few of its environments.
    "gem-llm": f"{_EXTRA}, then pip install --no-deps gem-llm==0.1.0",
}


class Adapted(gymnasium.Env[str, str]):
    """An environment of another shape, as gymnasium's.

    `step` may return five values (gymnasium, GEM), four with one end (older gym), or two (TextArena: done and
    info; the observation and, at the end, the rewards are then asked for). `reset` may return the observation
    with or without an info, or nothing.

    Args:
        inner: the environment.
        keeps_turns: its observations tell only what is new: a state is then all that was told and answered.
            What it asks for at the end of each (`suffix` in the info, GEM's) stands there once.
        reset_with: arguments of its `reset` besides the seed.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, inner: Any, keeps_turns: bool = False, **reset_with: Any) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.inner = inner
        self._keeps_turns = keeps_turns
        self._turns: list[str] = []
        self._reset_with = reset_with
        self._takes_seed = _names(inner.reset, "seed")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self._reset(seed)
        self._turns = []
        return self._state([obs], info), info

    def _reset(self, seed: int | None) -> tuple[str, dict[str, Any]]:
        if self._takes_seed:  # of later episodes, too: few keep numbers of their own
            seed = int(self.np_random.integers(2**31)) if seed is None else seed
            returned = self.inner.reset(seed=seed, **self._reset_with)
        else:
            returned = self.inner.reset(**self._reset_with)
        if returned is None:
            return self._observation(), {}
        if isinstance(returned, tuple) and len(returned) == 2:
            return _text(returned[0]), dict(returned[1] or {})
        return _text(returned), {}

    def step(self, action: str) -> Step:
        obs, reward, terminated, truncated, info = self._step(action)
        return self._state([action, obs], info), reward, terminated, truncated, info

    def _state(self, told: list[str], info: dict[str, Any]) -> str:
        """The last of what was told, or all of it."""
        if not self._keeps_turns:
            return told[-1]
        self._turns += [text.rstrip("\n") for text in told]
        return "\n".join(self._turns) + "\n" + str(info.get("suffix", ""))

    def _step(self, action: str) -> Step:
        returned = self.inner.step(action)
        if len(returned) == 5:
            obs, reward, terminated, truncated, info = returned
            return _text(obs), float(reward), bool(terminated), bool(truncated), dict(info)
        if len(returned) == 4:
            obs, reward, done, info = returned
            return _text(obs), float(reward), bool(done), False, dict(info)
        if len(returned) == 2:
            done, info = returned
            if not done:
                return self._observation(), 0.0, False, False, dict(info or {})
            rewards, game_info = self.inner.close()
            return "", float(rewards[0]), True, False, {**(info or {}), "game": dict(game_info or {})}
        raise ValueError(
            f"the environment's step: expected 5, 4 or 2 values (gymnasium, gym, TextArena), "
            f"got {len(returned)}"
        )

    def _observation(self) -> str:
        return _text(self.inner.get_observation()[1])

    def close(self) -> None:
        if hasattr(self.inner, "close") and not hasattr(self.inner, "get_observation"):
            self.inner.close()  # TextArena's `close` ends a game and tells the rewards


class Questions(gymnasium.Env[str, str]):
    """A data set of reasoning-gym: an episode is one question, the reward its checker's verdict."""

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, dataset: Any) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.dataset = dataset
        self.entry: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.entry = self.dataset[int(self.np_random.integers(len(self.dataset)))]
        return _text(self.entry["question"]), {}

    def step(self, action: str) -> Step:
        reward = float(self.dataset.score_answer(action.strip(), self.entry))
        return _text(self.entry["question"]), reward, True, False, {}


def adapt(env: Any) -> gymnasium.Env[Any, Any]:
    """The environment where it is gymnasium's, else adapted by its shape; ValueError where it is none."""
    if isinstance(env, gymnasium.Env):
        return env
    if is_openenv(env):
        return OpenEnv(env)
    if is_tools(env):
        return Tools(env)
    if callable(getattr(env, "reset", None)) and callable(getattr(env, "step", None)):
        return Adapted(env)
    raise ValueError(f"expected an environment with reset and step or tools, got {type(env).__name__}")


def make_foreign(spec: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any] | None:
    """`gem:ID`, `reasoning-gym:TASK` or `textarena:ID`; None where the text is none of these."""
    source, _, name = spec.partition(":")
    maker = MAKERS.get(source)
    return None if maker is None else maker(name, arguments)


def is_foreign(spec: str) -> bool:
    """True where `make_foreign` knows the first word."""
    return spec.partition(":")[0] in MAKERS


def _gem(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    package = _load("gem", "gem-llm")
    _load("gem.envs", "gem-llm")
    return Adapted(_made(f"gem:{name}", lambda: package.make(name, **arguments)), keeps_turns=True)


def _reasoning_gym(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    package = _load("reasoning_gym", "reasoning-gym")
    return Questions(
        _made(f"reasoning-gym:{name}", lambda: package.create_dataset(name, **{"size": 1000, **arguments}))
    )


def _textarena(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    package = _load("textarena", "textarena")
    return Adapted(_made(f"textarena:{name}", lambda: package.make(name, **arguments)), num_players=1)


MAKERS: dict[str, Callable[[str, dict[str, Any]], gymnasium.Env[Any, Any]]] = {
    "gem": _gem,
    "reasoning-gym": _reasoning_gym,
    "textarena": _textarena,
}


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"expected the package {package}, got: {told}; {INSTALL[package]}") from error


def _made(spec: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # each package has its own kinds of error for a name that it does not know
        told = " ".join(f"{type(error).__name__}: {error}".replace("*", " ").split())[:300]
        raise ValueError(f"cannot make environment {spec!r}: {told}") from error


def _names(function: Any, parameter: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == parameter or p.kind is p.VAR_KEYWORD for p in parameters)


def _text(obs: Any) -> str:
    if not isinstance(obs, str):
        raise ValueError(f"the environment's observation: expected text, got {type(obs).__name__}")
    return obs
