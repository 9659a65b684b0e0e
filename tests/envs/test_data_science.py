import json
import subprocess
import sys
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import etpo.envs
from etpo.envs.data_science import DataScience
from etpo.envs.prompts import SIGNATURE, reflection_prompt
from etpo.envs.scoring import Scorer

GOOD = "    from sklearn.naive_bayes import GaussianNB\n    return GaussianNB().fit(x_train, y_train)\n"


@pytest.fixture
def env(small, sandbox):
    return DataScience(scorer=Scorer(small, sandbox), max_episode_steps=3)


def test_gymnasium_accepts_it(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*render modes.*")
        check_env(env)


def test_the_first_program_that_runs_terminates(env):
    task, info = env.reset(seed=0)
    assert "small: 60 rows, 2 features, 2 classes" in task
    assert task.endswith(SIGNATURE)
    assert info == {}
    obs, reward, terminated, truncated, info = env.step(GOOD)
    assert (terminated, truncated) == (True, False)
    assert reward == info["auc_mean"] == env.scorer.score(GOOD).auc_mean
    assert set(info) == {"outcome", "auc_mean", "auc_std", "error", "wall_s"}
    assert (info["outcome"], info["error"]) == ("ok", None)
    assert obs in env.observation_space


def test_neighbours_by_brute_force_need_no_proc(env):
    env.reset()
    body = (
        "from sklearn.neighbors import KNeighborsClassifier\n"
        "return KNeighborsClassifier(3, algorithm='brute').fit(x_train, y_train)\n"
    )
    assert env.step(body)[4]["error"] is None


def test_failures_lead_to_reflection_and_the_last_one_truncates(env):
    task, _ = env.reset()
    for attempt in range(3):
        body = f"    return {attempt}\n"
        obs, reward, terminated, truncated, info = env.step(body)
        assert (reward, terminated, truncated) == (-1.0, False, attempt == 2)
        assert info["error"] == "AttributeError: int has no predict_proba; return a classifier that has it"
        assert obs == reflection_prompt(task, body, info["error"])
        assert obs in env.observation_space
    assert env.reset()[0] == task
    assert env.step("    return 0\n")[3] is False


def test_without_reflection_each_attempt_is_a_fresh_one(small, sandbox):
    env = DataScience(scorer=Scorer(small, sandbox), max_episode_steps=2, reflection=False)
    task, _ = env.reset()
    assert env.step("    return 1\n")[0] == task
    obs, _, _, truncated, info = env.step("    return 2\n")
    assert (obs, truncated) == (task, True)
    assert "int has no predict_proba" in info["error"]


def test_a_checkpoint_goes_on_in_the_middle_of_an_episode(env, small, sandbox):
    env.reset()
    env.step("return 1")
    obs = env.step("return 2")[0]
    state = json.loads(json.dumps(env.state_dict()))
    other = DataScience(scorer=Scorer(small, sandbox), max_episode_steps=3)
    assert other.load_state_dict(state) == obs
    assert other.step("return 3")[3] is True


def test_text_of_any_script_is_in_the_spaces(env):
    assert "π = 3 # 你好 🙂\n" in env.action_space
    assert "" in env.action_space
    assert 3 not in env.action_space
    assert "x" * 1_000_001 not in env.action_space


def test_made_by_its_registered_id_it_owns_and_closes_its_sandbox():
    env = gymnasium.make("etpo/DataScience-v0", dataset="balance_scale", timeout_s=3.0)
    assert "625 rows, 4 features, 3 classes" in env.reset()[0]
    inner = env.unwrapped
    assert inner.scorer.sandbox.timeout_s == 3.0
    server = inner.scorer.sandbox._process
    env.close()
    assert server.poll() is not None


def test_wrong_use_is_a_value_error(small, sandbox):
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        DataScience(scorer=Scorer(small, sandbox), max_episode_steps=0)
    with pytest.raises(ValueError, match="unknown data set"):
        DataScience("no-such-set")


def test_importing_the_environments_imports_no_scikit_learn():
    assert "etpo/DataScience-v0" in gymnasium.registry
    assert etpo.envs.__doc__
    code = "import sys, etpo.envs; sys.exit(any(m in sys.modules for m in ('sklearn', 'pandas', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_clients_of_the_sources_are_imported_where_something_is_fetched():
    clients = "('openml', 'kagglehub', 'requests')"
    code = f"import sys, etpo.envs.datasets; sys.exit(any(m in sys.modules for m in {clients}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
