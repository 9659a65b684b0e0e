import json
import math
import textwrap

import gymnasium
import pytest
from gymnasium.spaces import Text

from etpo.envs.data_science import DataScience
from etpo.envs.scoring import Scorer
from etpo.envs.vector import VectorRunner, make_env, takes

GOOD = "    from sklearn.naive_bayes import GaussianNB\n    return GaussianNB().fit(x_train, y_train)\n"


class Counter(gymnasium.Env):
    """Ends at the third step; its observation tells seed and step."""

    observation_space = action_space = Text(20)

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = seed, 0
        return f"{seed}:{self.t}", {}

    def step(self, action):
        self.t += 1
        return f"{self.seed}:{self.t}", 0.5, self.t == 3, False, {"action": action}


@pytest.fixture
def scorer(small, sandbox):
    return Scorer(small, sandbox)


def test_programs_of_one_batch_are_scored_together(scorer, monkeypatch):
    batches = []
    score_many = scorer.score_many
    monkeypatch.setattr(scorer, "score_many", lambda actions: batches.append(actions) or score_many(actions))
    runner = VectorRunner(
        [DataScience(scorer=scorer), Counter(), DataScience(scorer=scorer, max_episode_steps=1)]
    )
    task = runner.reset(seed=5)
    assert task == [runner.envs[0].task, "6:0", runner.envs[2].task]
    good, count, bad = runner.step([GOOD, "act", "return 1"])
    assert batches == [[GOOD, "return 1"]]
    assert good.terminated
    assert not good.truncated
    assert good.reward == good.info["auc_mean"]
    assert good.next_obs_after_reset == task[0]
    assert (count.obs, count.reward, count.info) == ("6:1", 0.5, {"action": "act"})
    assert count.next_obs_after_reset == count.obs
    assert bad.truncated
    assert not bad.terminated
    assert "int has no predict_proba" in bad.obs
    assert bad.next_obs_after_reset == task[2]
    assert runner.observations == [task[0], "6:1", task[2]]


def test_each_scorer_gets_its_own_batch(small, sandbox):
    runner = VectorRunner([DataScience(scorer=Scorer(small, sandbox, (seed,))) for seed in (0, 1)])
    runner.reset()
    first, second = runner.step([GOOD, GOOD])
    assert first.reward != second.reward


def test_an_ended_episode_is_reset_and_others_go_on():
    runner = VectorRunner([Counter(), Counter()])
    runner.reset(seed=0)
    for _ in range(2):
        runner.step(["a", "b"])
    first, second = runner.step(["a", "b"])
    assert (first.obs, first.terminated, first.next_obs_after_reset) == ("0:3", True, "None:0")
    assert second.info == {"action": "b"}
    assert runner.step(["a"])[0].obs == "None:1"
    assert runner.observations == ["None:1", "None:0"]


def test_a_checkpoint_keeps_what_can_be_kept(scorer):
    def make():
        return VectorRunner([DataScience(scorer=scorer), Counter()])

    runner = make()
    runner.reset(seed=0)
    runner.step(["return 1", "a"])
    state = json.loads(json.dumps(runner.state_dict()))
    again = make()
    observations = again.load_state_dict(state)
    assert observations[0] == runner.observations[0]
    assert "int has no predict_proba" in observations[0]
    assert observations[1] == "None:0"
    assert again.step([GOOD, "a"])[0].terminated
    with pytest.raises(ValueError, match="2 environments, got 1"):
        VectorRunner([Counter()]).load_state_dict(state)


def test_wrong_use_is_a_value_error():
    env = Counter()
    for envs in ([], [env, env]):
        with pytest.raises(ValueError, match="different environments"):
            VectorRunner(envs)
    runner = VectorRunner([env])
    with pytest.raises(ValueError, match="reset"):
        runner.step(["a"])
    runner.reset()
    for actions in ([], ["a", "b"]):
        with pytest.raises(ValueError, match=f"got {len(actions)}"):
            runner.step(actions)


def test_environments_are_made_by_id_and_by_class(scorer, tmp_path, monkeypatch):
    env = make_env("etpo/DataScience-v0", scorer=scorer, max_episode_steps=2)
    assert isinstance(env, DataScience)
    assert env.max_episode_steps == 2
    assert isinstance(make_env("etpo.envs.data_science:DataScience", scorer=scorer), DataScience)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_env_for_test.py").write_text(
        textwrap.dedent("""
        import gymnasium
        class Mine(gymnasium.Env):
            def __init__(self, size): self.size = size
        """)
    )
    assert make_env("my_env_for_test:Mine", size=4).size == 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("etpo/NoSuch-v0", "unknown environment 'etpo/NoSuch-v0'"),
        ("no_such_module:Env", "no_such_module"),
        (".vector:Env", "cannot load environment '.vector:Env'"),
        ("etpo.envs.vector:NoSuch", "NoSuch"),
        ("etpo.envs.vector:VectorRunner", "cannot make environment.*--env-arg"),
    ],
)
def test_what_is_no_environment_is_a_value_error(spec, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_env(spec)
    assert "\n" not in str(caught.value)


def test_an_environment_without_text_is_refused_at_the_first_reset():
    with pytest.raises(ValueError, match="a state that is text, got ndarray"):
        VectorRunner([make_env("CartPole-v1")]).reset()


@pytest.mark.parametrize(
    ("result", "words"), [(("1", math.nan), "a finite float32, got float nan"), ((3, 0.5), "text, got int")]
)
def test_what_a_step_returns_is_checked(monkeypatch, result, words):
    monkeypatch.setattr(Counter, "step", lambda self, action: (*result, False, False, {}))
    runner = VectorRunner([Counter()])
    runner.reset()
    with pytest.raises(ValueError, match=words):
        runner.step(["a"])


def test_what_a_constructor_takes_is_known():
    assert takes("etpo/ProgramRepair-v0", "reflection")
    assert takes("etpo.envs.data_science:DataScience", "timeout_s")
    assert not takes("etpo/GridWorld-v0", "reflection")
    assert not takes("CartPole-v1", "reflection")
    with pytest.raises(ValueError, match="unknown environment"):
        takes("etpo/NoSuch-v0", "reflection")
