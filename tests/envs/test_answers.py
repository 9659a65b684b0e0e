"""Environments of a user's own: an answer of another shape ends in one line that names them."""

import gymnasium
import numpy as np
import pytest
import torch

from etpo.envs.answers import EnvironmentFault, checked, reset, step, whole_text


class Mine(gymnasium.Env):
    """Answers what it is given."""

    def __init__(self, answer=None):
        self.answer = answer

    def reset(self, *, seed=None, options=None):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def step(self, action):
        return self.reset()


def answer(**changes):
    whole = {"obs": "say", "reward": 0.5, "terminated": True, "truncated": False, "info": {}}
    return tuple((whole | changes).values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("say", r"environment Mine: expected reset to return \(text, info\), got str 'say'"),
        (("say",), "got tuple"),
        (("say", None), r"got tuple \('say', None\)"),
        ((3, {}), "expected reset to return a state that is text, got int 3"),
        (KeyError("word"), "environment Mine: reset raised KeyError: 'word'"),
    ],
)
def test_a_reset_of_another_shape_is_refused(given, words):
    with pytest.raises(EnvironmentFault, match=words) as caught:
        reset(Mine(given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("say", 0.5, False, {}), r"expected step to return \(text, reward, terminated, truncated, info\)"),
        (answer(info=None), "got tuple"),
        (answer(obs=b"say"), "a state that is text, got bytes"),
        (answer(reward=None), "a reward that is a finite float32, got NoneType None"),
        (answer(reward="1"), "got str '1'"),
        (answer(reward=np.array([1.0, 2.0])), "got ndarray"),
        (answer(reward=float("nan")), "got float nan"),
        (answer(reward=-float("inf")), "got float -inf"),
        (answer(reward=1e39), r"got float 1e\+39"),
        (answer(reward=10**400), "got int 1000"),
        (answer(terminated=None), "terminated and truncated as True or False, got NoneType None"),
        (answer(info={"auc_mean": "high"}), r"info\['auc_mean'\] as a number or None, got str 'high'"),
        (RuntimeError("two\nlines"), "step raised RuntimeError: two lines"),
    ],
)
def test_a_step_of_another_shape_is_refused(given, words):
    with pytest.raises(EnvironmentFault, match=words) as caught:
        step(Mine(given), "do")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reward", [1, True, np.float32(1), np.int64(1), np.array(1.0), np.array([1.0]), torch.tensor(1.0)]
)
def test_a_number_of_any_kind_is_a_reward(reward):
    got = checked(Mine(), answer(reward=reward))[1]
    assert type(got) is float
    assert got == 1.0


def test_info_is_made_plain():
    info = {
        "auc_mean": np.float32(0.5),
        "wall_s": np.int64(2),
        "outcome": np.bool_(True),
        "error": ValueError("no"),
        "x": 3,
    }
    plain = checked(Mine(), answer(info=info, truncated=np.bool_(True)))[4]
    assert plain == {"auc_mean": 0.5, "wall_s": 2.0, "outcome": "True", "error": "ValueError: no", "x": 3}
    assert type(plain["auc_mean"]) is float


def test_halves_of_surrogate_pairs_are_joined_or_replaced():
    assert whole_text("cut \ud83d here") == "cut � here"
    assert whole_text("\ud83d\ude42 größe") == "🙂 größe"
    assert reset(Mine(("cut \ude42", {}))) == "cut �"
