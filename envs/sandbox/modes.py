"""`--sandbox strict | default | off`: what each demands, what it says, and the consent that `off` needs."""

import os
import sys
import warnings
from dataclasses import dataclass

from etpo import EtpoError
from etpo.envs.sandbox.box import wire

MODES = ("strict", "default", "off")
# `default` needs one of each: what keeps programs from files, and what from the network and the kernel.
NEEDED = ((wire.LANDLOCK, wire.MOUNT_NAMESPACE), (wire.NETWORK_NAMESPACE, wire.SECCOMP))
CONSENT_VARIABLE, CONSENT = "ETPO_SANDBOX_OFF", "yes-i-read-the-program"


class SandboxError(EtpoError):
    """The sandbox itself cannot work: its server does not start, or a mode was asked for that it lacks."""


class TooFewLayers(SandboxError):
    """The mode demands more layers than this machine permits; `report` tells which there are."""

    def __init__(self, message: str, report: "LayerReport") -> None:
        super().__init__(message)
        self.report = report


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
        raise TooFewLayers(
            f"--sandbox strict needs all layers; not in force: {_listed(report.missing)}", report
        )


def check_default(report: LayerReport) -> None:
    """SandboxError, in one line, where nothing keeps programs from files, or nothing from the network."""
    lacking = [names for names in NEEDED if not set(names) & set(report.in_force)]
    if lacking:
        needed = " and ".join(" or ".join(names) for names in lacking)
        reasons = _listed({name: report.missing.get(name, "") for names in lacking for name in names})
        raise TooFewLayers(
            f"--sandbox default needs {needed}, got none of them ({reasons}); use a kernel or a container "
            "that permits one, or --sandbox off (no protection: it asks for your consent)",
            report,
        )


def warn_once(report: LayerReport) -> None:
    """Say what is missing, the first time in this process."""
    global _has_warned
    if report.missing and not _has_warned:
        _has_warned = True
        warnings.warn(
            f"programs run without these layers of the sandbox: {_listed(report.missing)} "
            "(`etpo doctor` lists them all; --sandbox strict refuses to run so)",
            SandboxWarning,
            stacklevel=2,
        )


_has_warned = False


def _listed(missing: dict[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in missing.items())


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
