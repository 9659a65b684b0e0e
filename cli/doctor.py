"""`etpo doctor`: what this machine offers, and what is in force."""

import json
import os
import platform
import resource
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from etpo.envs.sandbox import Sandbox

NOBODY = 65534
# Layer of the sandbox → what a probe must find where it is in force. (Of the network namespace a program that
# may open no socket sees nothing.)
SHOWN_BY = {
    "resource limits": ("memory limit", "process limit", "file size limit"),
    "no new privileges": ("no new privileges",),
    "own user id": ("own user id",),
    "process namespace": ("process namespace",),
    "mount namespace": ("label files hidden",),
    "Landlock": ("label files hidden",),
    "seccomp filter": ("seccomp filter", "no network sockets"),
}


@click.command()
def doctor() -> None:
    """Print versions, devices, the sandbox's protections, the bundled model and the data home."""
    for name, value in facts():
        click.echo(f"{name:<16}{value}")


def facts() -> Iterator[tuple[str, str]]:
    """(name, value) of everything worth knowing when something does not work."""
    yield "etpo", _version("etpo")
    yield "python", platform.python_version()
    yield "kernel", platform.release()
    for package in ("torch", "transformers", "triton", "scikit-learn", "gymnasium"):
        yield package, _version(package)

    import torch

    yield "gpu", _gpus()
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used"
    yield "threads", f"{torch.get_num_threads()} of PyTorch"
    yield from _sandbox()

    from etpo.engine.models.places import BUNDLED, bundled_path

    has_model = (bundled_path() / "model.safetensors").is_file()
    yield BUNDLED, str(bundled_path()) if has_model else "absent; build it with `etpo pretrain`"
    yield "data home", _data_home()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)


def _data_home() -> str:
    from etpo.envs.datasets.catalog import DatasetError
    from etpo.envs.datasets.home import data_home

    try:
        home = data_home()
    except DatasetError as error:
        return str(error)
    if not home.is_dir():
        return f"{home} (not there yet)"
    return f"{home} ({sum(child.is_dir() for child in home.iterdir())} folders)"


# Runs as a program would, and says what it finds itself able to do.
PROBE = """
def build_model(x_train, y_train):
    import ctypes, json, os, resource, socket
    import sklearn

    def can(action, *args):
        try:
            action(*args)
        except OSError:
            return False
        return True

    kinds = ("AS", "NPROC", "FSIZE")
    limits = {kind: resource.getrlimit(getattr(resource, "RLIMIT_" + kind))[0] for kind in kinds}
    raise RuntimeError(json.dumps({
        "uid": os.getuid(),
        "limits": limits,
        "no_new_privs": ctypes.CDLL(None).prctl(39, 0, 0, 0, 0),
        "seccomp": ctypes.CDLL(None).prctl(21, 0, 0, 0, 0),
        "parent": os.getppid(),
        "socket": can(socket.socket),
        "labels": can(os.listdir, os.path.join(os.path.dirname(sklearn.__file__), "datasets", "data")),
    }))
"""


def _sandbox() -> Iterator[tuple[str, str]]:
    """One line for each layer: in force or not, and why; a probe, run as a program is, has a say."""
    from etpo.envs.sandbox import Sandbox, SandboxError
    from etpo.envs.sandbox.box import wire
    from etpo.envs.sandbox.box.layers import USER_NAMESPACE
    from etpo.envs.sandbox.modes import SandboxWarning, TooFewLayers

    holds: dict[str, bool] = {}
    try:
        with warnings.catch_warnings(), Sandbox(workers=1) as sandbox:
            warnings.simplefilter("ignore", SandboxWarning)
            layers = sandbox.layers()
            holds = protections(probe(sandbox))
            default = "takes this machine"
    except TooFewLayers as error:
        layers, default = error.report, f"refuses this machine: {error}"
    except (SandboxError, ValueError) as error:
        yield "sandbox", f"does not work: {error}"
        return
    name = "sandbox"
    for layer in wire.LAYERS:
        promised = () if USER_NAMESPACE in layers.in_force.get(layer, "") else SHOWN_BY.get(layer, ())
        failed = [promise for promise in promised if holds and not holds[promise]]
        if layer in layers.missing:
            said = f"NOT in force: {layers.missing[layer]}"
        elif failed:
            said = f"NOT in force, although set up: a probe finds no {', '.join(failed)}"
        else:
            said = f"in force: {layers.in_force[layer]}"
        yield name, f"{layer:<19}{said}"
        name = ""
    yield "", f"--sandbox default {default}"
    yield "", f"--sandbox strict {'refuses' if layers.missing else 'takes'} this machine"


def probe(sandbox: "Sandbox") -> dict[str, Any]:
    """What a program in this sandbox can do. ValueError where the probe itself does not run."""
    import numpy as np

    from etpo.envs.sandbox import SplitArrays

    arrays = SplitArrays(np.zeros((4, 1)), np.array([0, 1, 0, 1]), np.zeros((4, 1)))
    (result,) = sandbox.run([(PROBE, arrays, 0)])
    arrays.close()
    if result.failure is None or result.failure.kind != "RuntimeError":
        raise ValueError(f"the probe ended as {result.outcome}: {result.failure}")
    told: dict[str, Any] = json.loads(result.failure.message)
    return told


def protections(found: dict[str, Any]) -> dict[str, bool]:
    """Name of each protection, and whether the probe's findings show it in force."""
    unlimited = resource.RLIM_INFINITY
    return {
        "own user id": found["uid"] not in (os.getuid(), NOBODY),
        "memory limit": found["limits"]["AS"] != unlimited,
        "process limit": found["limits"]["NPROC"] != unlimited,
        "file size limit": found["limits"]["FSIZE"] != unlimited,
        "no new privileges": found["no_new_privs"] == 1,
        "seccomp filter": found["seccomp"] == 2,
        "no network sockets": not found["socket"],
        "process namespace": found["parent"] == 0,  # it was forked from outside
        "label files hidden": not found["labels"],
    }
