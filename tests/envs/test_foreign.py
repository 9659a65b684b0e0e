"""Environments of other packages, played by fakes of the same shape; one by itself where it is."""

import importlib.util
import sys
from types import SimpleNamespace

import gymnasium
import pytest

from etpo.envs.vector import VectorRunner, make_env, takes


class Five:
    """GEM's and gymnasium's shape, without their classes."""

    def __init__(self, size=1, word="a"):
        self.size, self.word = size, word

    def reset(self, seed=None):
        self.seed = seed
        return f"{self.word} {self.size}", {"suffix": "Your word: "}

    def step(self, action):
        return action + "!", 0.5, action == "stop", False, {"turn": 1}


class Four(Five):
    def reset(self):
        return "hello"

    def step(self, action):
        return action, 1, action == "stop", {}


class TextArena:
    """Two values a step; observations on request; rewards when it is closed."""

    def __init__(self):
        self.closed = 0

    def reset(self, num_players, seed=None):
        assert num_players == 1
        self.turn = 0

    def get_observation(self):
        return 0, f"turn {self.turn}"

    def step(self, action):
        self.turn += 1
        return self.turn == 3, {"turn": self.turn}

    def close(self):
        self.closed += 1
        return {0: 0.75}, {0: {"invalid_move": False}}


class Shapeless:
    pass


class Questions:
    def __init__(self, name, size, seed=0):
        if name != "sums":
            raise KeyError(name)
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"question": f"{i} + 1?", "answer": str(i + 1)}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


def _made(name, **arguments):
    if name != "game:Guess-v0":
        raise ValueError(f"Environment {name} not found in registry.")
    return Five(**arguments)


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gem", SimpleNamespace(make=_made))
    monkeypatch.setitem(sys.modules, "gem.envs", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=Questions))
    monkeypatch.setitem(sys.modules, "textarena", SimpleNamespace(make=lambda name: TextArena()))


def test_gem(packages):
    env = make_env("gem:game:Guess-v0", size=3, word="b")
    assert isinstance(env, gymnasium.Env)
    assert env.reset(seed=4) == ("b 3\nYour word: ", {"suffix": "Your word: "})
    assert env.step("go\n") == ("b 3\ngo\ngo\n!\n", 0.5, False, False, {"turn": 1})
    assert env.step("stop") == ("b 3\ngo\ngo\n!\nstop\nstop!\n", 0.5, True, False, {"turn": 1})
    assert env.inner.seed == 4
    assert env.reset(seed=4)[0] == "b 3\nYour word: "
    assert not takes("gem:game:Guess-v0", "sandbox")


def test_reasoning_gym(packages):
    env = make_env("reasoning-gym:sums", size=5)
    question, _ = env.reset(seed=0)
    number = int(question.split()[0])
    assert env.reset(seed=0)[0] == question
    assert env.step(f" {number + 1}\n")[1:4] == (1.0, True, False)
    assert env.step("no")[1] == 0.0


def test_textarena_takes_several_turns_in_one_episode(packages):
    runner = VectorRunner([make_env("textarena:Guess-v0") for _ in range(2)])
    assert runner.reset(seed=0) == ["turn 0", "turn 0"]
    steps = [runner.step(["x", "y"])[0] for _ in range(3)]
    assert [(step.obs, step.reward, step.terminated) for step in steps] == [
        ("turn 1", 0.0, False), ("turn 2", 0.0, False), ("", 0.75, True),
    ]  # fmt: skip
    assert steps[-1].next_obs_after_reset == "turn 0"
    runner.close()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gem:nothing", "cannot make environment 'gem:nothing': ValueError: Environment nothing not found"),
        ("reasoning-gym:nothing", "cannot make environment 'reasoning-gym:nothing'"),
        (f"{__name__}:Shapeless", "expected an environment with reset and step or tools, got Shapeless"),
        (f"{__name__}:Nothing", "expected module:Class"),
    ],
)
def test_what_cannot_be_made_is_one_line(packages, spec, said, monkeypatch):
    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or SimpleNamespace(Shapeless=Shapeless)
    )
    with pytest.raises(ValueError) as caught:
        make_env(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_object_of_the_shape_will_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapes", SimpleNamespace(Five=Five, Four=Four))
    assert make_env("shapes:Five", size=2).reset()[0] == "a 2"
    env = make_env("shapes:Four")
    assert env.reset() == ("hello", {})
    assert env.step("stop") == ("stop", 1.0, True, False, {})


def test_a_package_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(ValueError, match=r"textarena.*pip install 'etpo\[envs\]'"):
        make_env("textarena:Wordle-v0")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")
def test_reasoning_gym_itself():
    env = make_env("reasoning-gym:leg_counting", size=3, seed=0)
    env.reset(seed=0)
    assert env.step(env.entry["answer"])[1] == 1.0
