"""The environments that docs/environments.md builds, taken from the page and run."""

import json
import re
from pathlib import Path

import pytest

from etpo.envs.vector import VectorRunner

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture(scope="module")
def page() -> dict:
    space: dict = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, space)
    return space


def test_a_third_coding_environment_is_a_page(page):
    env = page["Regex"]()
    prompt, _ = env.reset(seed=0)
    assert prompt.startswith("# A regular expression for ")
    obs, reward, terminated, truncated, info = env.step("(")
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert obs == f"{prompt}(\n# Failed: {info['error']}\n# Corrected:\n{prompt}"
    right = {"a year": r"19\\d\\d", "an even": r"(\\d\\d)+"}
    answer = next(v for k, v in right.items() if k in prompt).replace("\\\\", "\\")
    saved = json.loads(json.dumps(env.state_dict()))
    other = page["Regex"]()
    assert other.load_state_dict(saved) == obs
    assert other.step(answer)[1:4] == (1.0, True, False)


def test_environments_that_share_a_judge_are_judged_in_one_batch(page):
    envs = [page["Regex"]() for _ in range(3)]
    batches = []

    class Judge(page["RegexJudge"]):
        def judge_many(self, attempts):
            batches.append(len(attempts))
            return super().judge_many(attempts)

    shared = Judge()
    for env in envs[:2]:
        env.judge = shared
    runner = VectorRunner(envs)
    runner.reset(seed=0)
    assert len(runner.step(["x", "y", "z"])) == 3
    assert batches == [2]


def test_without_reflection_each_attempt_is_fresh_and_the_last_truncates(page):
    env = page["Regex"](max_episode_steps=2, reflection=False)
    prompt, _ = env.reset(seed=1)
    assert env.step("(")[0] == prompt
    assert env.step("(")[2:4] == (False, True)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        page["Regex"](max_episode_steps=0)
