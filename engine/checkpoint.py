"""Atomic checkpoints: a folder of safetensors and JSON that is either whole or not there.

A checkpoint is written beside its place, synced to disk and renamed, so that a process killed at any moment
leaves the last complete one. The newest few are kept; a damaged one is named, and the one before it is used.
"""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etpo import EtpoError
from etpo.engine.models.roles import FullRoles, LoraRoles
from etpo.engine.permissions import honour_umask

KEPT = 3


class CheckpointError(EtpoError):
    """No usable checkpoint; the message says what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete state at the end of an iteration.

    Attributes:
        step: programs executed so far.
        tensors: weights, optimiser moments, replayed actions and random states, by name.
        state: everything else; JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN` atomically and drop all but the newest few.

    Behind a cut iteration nothing is dropped: a longer run goes on from the last whole one, which must stay.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:06d}"
    for left in folder.glob(".partial-*"):  # of a process that was killed: only one may write here
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f".partial-{os.getpid()}"
    partial.mkdir()
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        _save_tensors(tensors, partial / "state.safetensors")
        digest = _digest(partial / "state.safetensors")
        meta = {"step": checkpoint.step, "sha256": digest, "state": checkpoint.state}
        (partial / "state.json").write_text(json.dumps(meta), encoding="utf-8")
        honour_umask(partial)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if checkpoint.state.get("whole", True):
        others = [path for path in list_checkpoints(folder) if path != final]
        for old in others[: 1 - KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    # The longer name is the later step: from a million on, names have more digits.
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointError: truncated, foreign or unreadable.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if _digest(path / "state.safetensors") != meta["sha256"]:
            raise CheckpointError(
                f"{path}: expected a complete checkpoint, got one whose weights are damaged"
            )
        tensors = load_file(path / "state.safetensors")
        return Checkpoint(meta["step"], tensors, meta["state"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        kind = type(error).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint of etpo, got {kind}: {str(error)[:120]}"
        ) from error


def latest_checkpoint(folder: Path, *, whole: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest usable checkpoint, and one line for each newer one that is damaged.

    Args:
        whole: only checkpoints that end a whole iteration, from which a longer run continues bit for bit.
    """
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if not whole or checkpoint.state.get("whole"):
            return checkpoint, damaged
    return None, damaged


def role_tensors(roles: FullRoles | LoraRoles) -> dict[str, Tensor]:
    """The weights of the roles that have weights of their own, by name, for a checkpoint."""
    return {
        f"{role}/{name}": parameter
        for role in roles.moves
        for name, parameter in roles.parameters(role).items()
    }


@torch.no_grad()
def load_roles(roles: FullRoles | LoraRoles, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into the roles that have weights of their own.

    Raises:
        CheckpointError: it is of another model.
    """
    for role in roles.moves:
        for name, parameter in roles.parameters(role).items():
            kept = tensors.get(f"{role}/{name}")
            if kept is None or kept.shape != parameter.shape:
                got = "none" if kept is None else f"one of shape {tuple(kept.shape)}"
                raise CheckpointError(
                    f"the checkpoint is of another model or form of roles: expected {role}/{name} of shape "
                    f"{tuple(parameter.shape)}, got {got}"
                )
            parameter.copy_(kept)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """`save_file`, whose own error for a full disk is no OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _digest(path: Path) -> str:
    """The SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
