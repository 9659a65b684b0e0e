"""etpo: entropy-regularised token-level policy optimisation of language models.

`Config`, `Callback`, `train`, `load`, `score` and `rewards` are the public names, beside the packages
`etpo.kernels`, `etpo.envs` and `etpo.engine`; what they need is imported when they are used.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gymnasium

    from etpo.engine.callbacks import Callback
    from etpo.engine.config import Config
    from etpo.engine.progress import Outcome
    from etpo.engine.trained import Trained
    from etpo.envs.scoring import Score

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "EtpoError", "__version__", "load", "rewards", "score", "train"]


# In a checkout whose folder comes before an installation on the path the packages lie beside this folder;
# typings/etpo has them under their names.
_NAMES = Path(__file__).resolve().parents[1] / "typings" / "etpo"
if _NAMES.is_dir() and importlib.util.find_spec("etpo.kernels") is None:
    __path__.append(str(_NAMES))


class EtpoError(Exception):
    """What etpo raises on bad input, but for ValueError: one line that says what was expected and what came.

    Attributes:
        exit_code: what the command line ends with: 1 failed, 2 wrong use.
    """

    exit_code = 1


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"etpo.{name}")
    raise AttributeError(f"module 'etpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])


_LAZY = {"Config": "etpo.engine.config", "Callback": "etpo.engine.callbacks"}
_PACKAGES = ("engine", "envs", "kernels")


def train(
    config: "Config",
    out: str | Path | None = None,
    resume: bool = False,
    *,
    callbacks: "Sequence[Callback | Callable[[dict[str, Any]], object]]" = (),
    env: "type[gymnasium.Env[str, str]] | None" = None,
    progress: bool | None = None,
) -> "Outcome":
    """Train, and write report.html.

    Args:
        config: what to train, on what.
        out: the run's folder, new or empty; default `config.out`, else a new one in `runs`.
        resume: go on with the run in `out`.
        callbacks: `etpo.Callback` objects, or functions that are called with each iteration's metrics.
        env: the class of an environment of yours, in the place of `config.env`; one of a notebook will do.
        progress: show a bar; default: in a notebook or on a terminal.

    Raises:
        RunFolderError, CheckpointError: the folder cannot be used.
        ModelError, DatasetError, ValueError: bad input, one line.
        TypeError: a callback or an environment of the wrong kind.
    """
    from etpo.engine.callbacks import Callbacks, ProgressBar, is_watched, observed
    from etpo.engine.loggers import loggers_of
    from etpo.engine.loop import train as run_loop
    from etpo.engine.opening import open_folder, placed
    from etpo.engine.report.page import write_report

    if env is not None:
        if not isinstance(env, type):
            raise TypeError(f"env: expected a class, got {env!r}; its arguments go to config.env_arg")
        config = replace(config, env=f"{env.__module__}:{env.__qualname__}")
    config = placed(config, out)
    bar = [ProgressBar()] if (is_watched() if progress is None else progress) else []
    told = Callbacks([*bar, *loggers_of(config), *callbacks])
    with open_folder(config, resume=resume) as folder:
        outcome = observed(
            lambda observe: run_loop(config, folder, resume=resume, observe=observe),
            told,
            config,
            folder.path,
        )
        if outcome.step:
            write_report(folder)
    return outcome


def load(path: str | Path, device: str = "auto") -> "Trained":
    """The models of a run as its newest checkpoint left them; see `etpo.engine.trained.Trained`.

    Raises:
        RunFolderError: no run there.
        CheckpointError: no usable checkpoint in it.
        ModelError: the base is absent or unreadable.
    """
    from etpo.engine.trained import load as load_run

    return load_run(path, device)


def score(program: str, dataset: str, target: str | None = None) -> "Score":
    """Run one program in the sandbox and score it: mean ROC AUC over five random halvings, −1 if it fails.

    Args:
        program: source that defines `build_model(x_train, y_train)`, or its bare body.
        dataset: name of a data set, or path of a CSV file.
        target: the target's column; needed for a CSV file.

    Raises:
        UnknownDataset, DatasetError: no such data set, or it cannot be read.
    """
    from etpo.envs.datasets import load_dataset
    from etpo.envs.sandbox import Sandbox
    from etpo.envs.scoring import Scorer

    data = load_dataset(dataset, target)
    with Sandbox() as sandbox:
        return Scorer(data, sandbox).score(program)


def rewards(dataset: str, target: str | None = None) -> "Callable[..., list[float]]":
    """A reward function for TRL's GRPOTrainer: each program's mean ROC AUC, −1 where it fails.

    Programs of a batch run side by side in one sandbox, which ends with the process.

    Args:
        dataset: name of a data set, or path of a CSV file.
        target: the target's column; needed for a CSV file.

    Raises:
        UnknownDataset, DatasetError: no such data set, or it cannot be read.
    """
    import atexit

    from etpo.envs.datasets import load_dataset
    from etpo.envs.sandbox import Sandbox
    from etpo.envs.scoring import Scorer

    sandbox = Sandbox()
    atexit.register(sandbox.close)
    scorer = Scorer(load_dataset(dataset, target), sandbox)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        return [found.reward for found in scorer.score_many(texts)]

    return reward
