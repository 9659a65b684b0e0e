"""All environments: gymnasium's own check, and the page of docs that builds one."""

import re
import warnings
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import etpo.envs
from etpo.envs.vector import make_env, takes

DOCS = Path(__file__).parents[2] / "docs"
OURS = sorted(name for name in gymnasium.registry if name.startswith("etpo/"))


@pytest.mark.parametrize("name", OURS)
def test_gymnasium_accepts_every_environment(name):
    assert etpo.envs.__doc__
    env = gymnasium.make(name).unwrapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*render modes.*")
            warnings.filterwarnings("ignore", category=UserWarning, module="etpo")
            check_env(env)
    finally:
        env.close()


def test_they_are_these():
    expected = ["DataScience", "GridWorld", "ProgramRepair", "TokenMDP"]
    assert [f"etpo/{name}-v0" for name in expected] == OURS


def example() -> str:
    """The environment that docs/environments.md builds."""
    page = (DOCS / "environments.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]


def test_the_page_s_environment_has_thirty_lines_and_trains(tmp_path, monkeypatch, tiny_folder):
    code = example()
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_env.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "environments.md").read_text(encoding="utf-8")
    spec = re.search(r"--env (my_env:\w+)", page)[1]
    env = make_env(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*render modes.*")
        check_env(env)
    obs, _ = env.reset(seed=0)
    word = re.search(r"\w+$", obs)[0]
    assert env.step(word[::-1])[1] == 1.0
    assert takes(spec, "max_episode_steps")

    from click.testing import CliRunner

    from etpo.cli.main import main

    words = ["train", "--env", spec, "--model", str(tiny_folder), "--steps", "8", "--envs", "4",
             "--max-new-tokens", "4", "--threads", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "run" / "programs.jsonl").read_text().splitlines()) == 8
