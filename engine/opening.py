"""Opening a run's folder: what is wrong is said first, and while it is written to nobody else writes there.

`etpo train` and `etpo.train` both come in here. Nothing here imports torch unless something is wrong.
"""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from etpo.engine.config import OPTIONS, Config, to_toml
from etpo.engine.machine import origin
from etpo.engine.run_folder import RunFolder, RunFolderError, default_out, read_records, write_atomically

# What may change when a run goes on: how far and where it goes, not what it is.
RESUMABLE = tuple(name for name, one in OPTIONS.items() if one.option.resumable)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def open_folder(config: Config, *, resume: bool = False) -> Iterator[RunFolder]:
    """The folder `config.out` with config.toml in it, locked until the context ends.

    A new folder that nothing was saved in is taken away again.

    Args:
        config: complete, see `placed`.
        resume: the folder is that of a run, which goes on as `config` says.

    Raises:
        RunFolderError: no run there, or not a new folder; not writable; another process writes to it; or the
            disk is full, inside the context too.
        ModelError, DatasetError, SandboxError, ValueError: bad input, one line; nothing was written.
    """
    assert config.out is not None
    path = Path(config.out)
    folder = RunFolder.existing(path) if resume else RunFolder(path)
    if resume:
        check_steps(config, folder)
    check_data(config)
    check_model(config, folder)
    if not resume:
        folder = RunFolder.create(path, config)
    with folder.held():
        if resume:
            _rewrite_config(config, folder)
        _note_origin(folder)
        try:
            yield folder
        except Exception as error:
            if is_disk_full(error):
                raise _disk_full(folder) from error
            raise
        finally:
            if not resume:
                folder.discard_if_unused()


def placed(config: Config, out: str | Path | None = None) -> Config:
    """The configuration with its folder, and with absolute paths, so that the run goes on from anywhere.

    Args:
        out: the run's folder; default `config.out`, else a new one in `runs`.
    """
    path = Path(out or config.out or default_out(config)).expanduser()
    return dataclasses.replace(
        config, out=str(path), dataset=_absolute(config.dataset), model=_absolute(config.model)
    )


def check_data(config: Config) -> None:
    """Say what is wrong with the data, and with the runner, before anything slow starts.

    Raises:
        DatasetError, ValueError: absent or unreadable data.
        SandboxError: where programs shall run, they cannot.
    """
    if config.runner != "local":
        from etpo.envs.remote import check_runner

        check_runner(config.runner, config.sandbox)
    if config.env is None:
        from etpo.envs.datasets import load_dataset

        load_dataset(config.dataset, config.target, config.protocol)


def check_model(config: Config, folder: RunFolder) -> None:
    """Say what is missing in a model folder before anything slow starts; loading finds out the rest.

    Of an agent its options are checked; nothing is sent.

    Raises:
        ModelError: a model folder without a tokenizer.
        HubError: a model of the hub that cannot be had.
        ValueError: what `config.agent` says cannot be.
    """
    if config.agent is not None:
        from etpo.engine.agents import agent_of

        agent_of(config)
        return
    path = Path(config.model).expanduser()
    is_held = folder.reference.is_dir()
    if not is_held:
        from etpo.engine.models.hub import check_hub

        check_hub(config.model)
    if not is_held and path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        from etpo.engine.models.places import ModelError

        raise ModelError(
            f"--model {config.model}: expected a tokenizer (tokenizer.json) beside the weights, got a folder "
            "without one; save it there with tokenizer.save_pretrained"
        )


def check_steps(config: Config, folder: RunFolder) -> None:
    """A run that goes on must have something left to do.

    Raises:
        ValueError: it has executed more programs than `config.steps` already.
    """
    done = [record["step"] for record in read_records(folder.metrics_file)[-1:]]
    if done and done[0] > config.steps:
        raise ValueError(
            f"--steps: expected at least {done[0]}, as many programs as this run has executed, got "
            f"{config.steps}; give more to go on, or none to write its page anew"
        )


def is_disk_full(error: BaseException) -> bool:
    """True where a file could not be written for want of space; safetensors says so in words only."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return type(error).__name__ == "SafetensorError" and "No space left on device" in str(error)


def _disk_full(folder: RunFolder) -> RunFolderError:
    has_saved = folder.checkpoints.exists()
    go_on = f"go on: {folder.resume_command}" if has_saved else "start again"
    return RunFolderError(
        f"{folder.path}: expected to save, got no space left on the disk; earlier checkpoints are whole: "
        f"free some space, then {go_on}",
        usage=False,
    )


def _rewrite_config(config: Config, folder: RunFolder) -> None:
    try:
        write_atomically(folder.config_file, to_toml(config))
    except OSError as error:
        raise RunFolderError(
            f"--resume {folder.path}: expected a folder that can be written, got {error.strerror}",
            usage=False,
        ) from error


def _note_origin(folder: RunFolder) -> None:
    """Add to origin.json how this part of the run was started, for its page."""
    try:
        starts = json.loads(folder.origin_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        starts = []
    with contextlib.suppress(OSError):  # a full disk is said by the first record that does not fit
        write_atomically(folder.origin_file, json.dumps([*starts, origin()], indent=1) + "\n")


def _absolute(name: str) -> str:
    """A path that is there as an absolute one; names stay."""
    path = Path(name).expanduser()
    is_file = path.is_file() and path.suffix.lower() in (".csv", ".tsv", ".gz")
    return str(path.resolve()) if is_file or (path / "config.json").is_file() else name
