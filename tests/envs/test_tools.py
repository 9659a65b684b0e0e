"""Environments of TRL's and OpenEnv's shapes, played by fakes with their real signatures."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

from etpo.envs.openenv import OpenEnv
from etpo.envs.tools import MAX_TURNS, Tools
from etpo.envs.vector import VectorRunner, make_env


class Wordle:
    """As in TRL's guide: one tool, a reward, a done, an exception when all is over."""

    def reset(self, **kwargs) -> str | None:
        self.reward, self.done = 0.0, False
        return "Guess a word."

    def guess(self, guess: str) -> str:
        """
        Make a guess.

        Args:
            guess: The guessed word.
        """
        if len(guess) != 5:
            raise ValueError("five letters")
        self.reward = 1.0 if guess == "stone" else 0.25
        self.done = guess == "stone"
        return f"{guess} it is" if self.done else "no"


class Counter:
    """Two tools, no `done`, nothing told at first."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, **kwargs) -> str | None:
        self.reward = 0.0
        return None

    def add(self, amount: int, times: int = 1) -> str:
        """Add."""
        self.reward += amount * times
        return f"now {self.reward:g}"

    def peek(self) -> str:
        """Look."""
        return f"{self.reward:g}"


class Rewardless:
    def reset(self, **kwargs):
        return None

    def look(self) -> str:
        return ""


@pytest.fixture
def shapes(monkeypatch):
    made = SimpleNamespace(Wordle=Wordle, Counter=Counter, Echo=Echo, Async=Async, Generic=GenericEnvClient)
    monkeypatch.setitem(sys.modules, "shapes", made)


def test_one_tool_is_called_by_plain_text(shapes):
    env = make_env("shapes:Wordle")
    assert isinstance(env, Tools)
    first, _ = env.reset(seed=0)
    assert first.startswith("Guess a word.\nTools:\nguess(guess: str) -> str\nMake a guess.\n")
    steps = [
        env.step(action)
        for action in ("abc", "river\n", ' {"name": "guess", "arguments": {"guess": "stone"}}')
    ]
    assert [step[1:4] for step in steps] == [(0.0, False, False), (0.25, False, False), (0.75, True, False)]
    assert steps[0][0] == first + "abc\nfive letters\n"
    assert steps[1][0] == first + "abc\nfive letters\nriver\nno\n"
    assert steps[2][0].endswith("stone it is\n")
    assert env.reset()[0] == first


def test_of_several_tools_one_is_named(shapes):
    env = make_env("shapes:Counter")
    assert env.reset()[0].startswith("Tools:\nadd(amount: int, times: int = 1) -> str\nAdd.\npeek() -> str\n")
    call = '<tool_call>\n{"name": "add", "arguments": {"amount": 2, "times": 3}}\n</tool_call>'
    obs, reward, *ended = env.step("{so} I say " + call)
    assert (reward, ended[:2]) == (6.0, [False, False])
    assert obs.endswith("</tool_call>\nnow 6\n")
    assert env.step('{"name": "fly", "arguments": {}}')[0].endswith("expected one of add, peek, got fly\n")
    assert "unexpected keyword" in env.step('{"name": "peek", "arguments": {"at": 1}}')[0]
    assert env.step("I am done.")[1:4] == (0.0, True, False)
    env.reset()
    ends = [env.step('{"name": "peek"}')[2:4] for _ in range(MAX_TURNS)]
    assert ends == [(False, False)] * (MAX_TURNS - 1) + [(False, True)]


def test_without_a_reward_it_is_one_line():
    with pytest.raises(ValueError, match="expected a `reward` of Rewardless after reset, got none"):
        Tools(Rewardless()).reset()


ActT, ObsT, StateT = TypeVar("ActT"), TypeVar("ObsT"), TypeVar("StateT")


@dataclass
class StepResult(Generic[ObsT]):
    observation: ObsT
    reward: float | None = None
    done: bool = False
    metadata: dict[str, Any] | None = None


@dataclass(kw_only=True)
class EchoAction:
    metadata: dict[str, Any] = field(default_factory=dict)
    message: str


@dataclass(kw_only=True)
class EchoObservation:
    done: bool = False
    reward: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    echoed_message: str
    length: int = 0


class EnvClient(Generic[ActT, ObsT, StateT]):
    """The client's public side, with a server of one line in its place."""

    def __init__(self, base_url="http://localhost"):
        self.base_url, self.closed, self.seeds = base_url, False, []

    def _step_payload(self, action):
        return {"message": action.message}

    def _parse_result(self, payload):
        told = payload["message"]
        observation = EchoObservation(echoed_message=told, length=len(told))
        return StepResult(observation, payload.get("reward"), told == "stop")

    def reset(self, **kwargs):
        self.seeds.append(kwargs["seed"])
        return self._parse_result({"message": "hello"})

    def step(self, action, **kwargs):
        assert isinstance(action, EchoAction)
        return self._parse_result(self._step_payload(action) | {"reward": 0.5})

    def close(self):
        self.closed = True


class Echo(EnvClient[EchoAction, EchoObservation, dict]):
    pass


class Async(EnvClient[EchoAction, EchoObservation, dict]):
    """As OpenEnv's own: asynchronous, with a twin that is not."""

    async def reset(self, **kwargs):
        raise AssertionError

    async def step(self, action, **kwargs):
        raise AssertionError

    def sync(self):
        return Echo(self.base_url)


class GenericEnvClient(EnvClient[dict[str, Any], dict[str, Any], dict[str, Any]]):
    """Dictionaries in and out."""

    def _step_payload(self, action):
        return action

    def _parse_result(self, payload):
        return StepResult({"cards": [1, 2], "action": payload, "done": False}, None, False)

    def step(self, action, **kwargs):
        assert isinstance(action, dict)
        return self._parse_result(self._step_payload(action))


@pytest.mark.parametrize("name", ["Echo", "Async"])
def test_openenv_with_one_field(shapes, name):
    env = make_env(f"shapes:{name}", base_url="http://there")
    assert isinstance(env, OpenEnv)
    assert env.inner.base_url == "http://there"
    runner = VectorRunner([env])
    assert runner.reset(seed=3) == ["hello"]
    (step,) = runner.step([" go\n"])
    assert (step.obs, step.reward, step.terminated) == ("go", 0.5, False)
    assert runner.step(["stop"])[0].terminated
    assert env.inner.seeds[0] == 3
    assert len(env.inner.seeds) == 2
    runner.close()
    assert env.inner.closed


def test_openenv_with_json(shapes):
    env = make_env("shapes:Generic")
    assert isinstance(env, OpenEnv)
    env.reset(seed=0)
    assert env.step('{"play": 2}')[:3] == ('{"cards": [1, 2], "action": {"play": 2}}', 0.0, False)
    assert env.step("two")[0].startswith("expected an action as a JSON object, got: Expecting value")
    assert env.step("[2]")[0] == "expected an action as a JSON object, got: list in its place\n"
