"""`--sandbox strict | default | off`: what each demands, what it says, and the consent that `off` needs."""

import os
import sys
import warnings
from dataclasses import dataclass

from etpo import EtpoError

MODES = ("strict", "default", "off")
CONSENT_VARIABLE, CONSENT = "ETPO_SANDBOX_OFF", "yes-i-read-the-program"


class SandboxError(EtpoError):
    """The sandbox itself cannot work: its server does not start, or a mode was asked for that it lacks."""


class SandboxWarning(UserWarning):
    """Programs run with fewer layers around them than there could be."""


@dataclass(frozen=True)
class LayerReport:
    """The layers around each program: layer → what holds, and layer → why it is not in force."""

    in_force: dict[str, str]
    missing: dict[str, str]


def hidden_paths() -> list[str]:
    """Where labels may lie besides the packages: the data home, caches, the working folder's runs."""
    given = (os.environ.get(name) for name in ("ETPO_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME"))
    paths = (*filter(None, given), "~/.cache", "~/scikit_learn_data", "runs")
    return [os.path.expanduser(path) for path in paths]  # of a user without a home: as they stand


def check_strict(report: LayerReport) -> None:
    """SandboxError, in one line, where any layer is missing."""
    if report.missing:
        raise SandboxError(f"--sandbox strict needs all layers; not in force: {_listed(report)}")


def warn_once(report: LayerReport) -> None:
    """Say what is missing, the first time in this process."""
    global _has_warned
    if report.missing and not _has_warned:
        _has_warned = True
        warnings.warn(
            f"programs run without these layers of the sandbox: {_listed(report)} "
            "(`etpo doctor` lists them all; --sandbox strict refuses to run so)",
            SandboxWarning,
            stacklevel=2,
        )


_has_warned = False


def _listed(report: LayerReport) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in report.missing.items())


def ask_for_off() -> None:
    """Have a person agree twice to running programs without the layers; SandboxError without consent.

    Where there is no terminal to ask on, the environment variable `ETPO_SANDBOX_OFF` must say so in full.
    """
    if os.environ.get(CONSENT_VARIABLE) == CONSENT:
        return
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise SandboxError(
            "--sandbox off lets programs that nobody has read do whatever your user may do; without a "
            f"terminal to ask on, it needs {CONSENT_VARIABLE}={CONSENT} in the environment"
        )
    for question in (
        "Programs written by a language model will run as your user, with your files and your network.\n"
        "Run them without the sandbox? Type yes: ",
        "A program can delete your files or send them away. Are you sure? Type yes again: ",
    ):
        sys.stderr.write(question)
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() != "yes":
            raise SandboxError("--sandbox off was not confirmed; use --sandbox default")
