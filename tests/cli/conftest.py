"""How the command tests run commands, and a small environment that is instant."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from etpo.cli.main import main

Cli = Callable[..., Result]

# Even lengths "run": their AUC is 0.5 and a little more for each different letter.
ENVIRONMENT = '''
import gymnasium
import os
import signal


class Letters(gymnasium.Env):
    """One step an episode; scores what it is told as the data-science environment does."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "say", {}

    def step(self, action):
        info = {"outcome": "error", "auc_mean": None, "auc_std": None, "error": "odd <length>", "wall_s": 0.0}
        reward = -1.0
        if len(action) % 2 == 0:
            reward = 0.5 + len(set(action)) / 1000
            info |= {"outcome": "ok", "auc_mean": reward, "auc_std": 0.01, "error": None}
        return "say", reward, True, False, info


class Interrupting(Letters):
    """The 20th step presses Ctrl-C."""

    steps = 0

    def step(self, action):
        Interrupting.steps += 1
        if Interrupting.steps == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(action)
'''


@pytest.fixture
def cli() -> Cli:
    """Run a command in this process."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment's name for `--env`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "letters_env.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "letters_env", raising=False)
    return "letters_env:Letters"


@pytest.fixture
def quick(letters: str, tiny_folder: Path) -> list[str]:
    """Options of a run that takes a second."""
    return ["--env", letters, "--model", str(tiny_folder), "--max-new-tokens", "4", "--threads", "1"]
