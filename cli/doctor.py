"""`etpo doctor`: what this machine offers, and what is in force."""

import json
import os
import platform
import resource
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from etpo.envs.sandbox import Sandbox

NOBODY = 65534


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

    from etpo.engine.language_model import BUNDLED, bundled_path

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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("ETPO_DATA_HOME") or cache / "etpo" / "data")
    if not home.is_dir():
        return f"{home} (not there yet)"
    return f"{home} ({sum(child.is_dir() for child in home.iterdir())} folders)"


# Runs as a program would, and says what it finds itself able to do.
PROBE = """
def build_model(x_train, y_train):
    import json, os, resource, socket
    import sklearn

    def can(action, *args):
        try:
            action(*args)
        except OSError:
            return False
        return True

    def status(name):
        try:
            with open("/proc/self/status") as file:
                return next((int(line.split()[1]) for line in file if line.startswith(name + ":")), None)
        except OSError:
            return None

    def namespace(kind):
        try:
            return os.readlink("/proc/self/ns/" + kind)
        except OSError:
            return None

    kinds = ("AS", "NPROC", "FSIZE")
    limits = {kind: resource.getrlimit(getattr(resource, "RLIMIT_" + kind))[0] for kind in kinds}
    raise RuntimeError(json.dumps({
        "uid": os.getuid(),
        "limits": limits,
        "no_new_privs": status("NoNewPrivs"),
        "seccomp": status("Seccomp"),
        "net": namespace("net"),
        "pid": namespace("pid"),
        "socket": can(socket.socket),
        "labels": can(os.listdir, os.path.join(os.path.dirname(sklearn.__file__), "datasets", "data")),
    }))
"""


def _sandbox() -> Iterator[tuple[str, str]]:
    """The protections that a probe finds in force, and those that it does not."""
    from etpo.envs.sandbox import Sandbox, SandboxError

    try:
        with Sandbox(workers=1) as sandbox:
            found = probe(sandbox)
    except (SandboxError, ValueError) as error:
        yield "sandbox", f"does not work: {error}"
        return
    layers = protections(found)
    yield "sandbox", "in force: " + (", ".join(name for name, holds in layers.items() if holds) or "nothing")
    yield "", "not in force: " + (", ".join(name for name, holds in layers.items() if not holds) or "nothing")


def probe(sandbox: "Sandbox") -> dict[str, Any]:
    """What a program in this sandbox can do. ValueError where the probe itself does not run."""
    import numpy as np

    from etpo.envs.sandbox import SplitArrays

    arrays = SplitArrays(np.zeros((4, 1)), np.array([0, 1, 0, 1]), np.zeros((4, 1)))
    (result,) = sandbox.run([(PROBE, arrays, 0)])
    arrays.close()
    if result.failure is None or result.failure.kind != "RuntimeError":
        raise ValueError(f"the probe ended as {result.outcome}: {result.failure}")
    return json.loads(result.failure.message)


def protections(found: dict[str, Any]) -> dict[str, bool]:
    """Name of each protection, and whether the probe's findings show it in force."""
    unlimited = resource.RLIM_INFINITY
    here = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")}
    return {
        "own user id": found["uid"] not in (os.getuid(), NOBODY),
        "memory limit": found["limits"]["AS"] != unlimited,
        "process limit": found["limits"]["NPROC"] != unlimited,
        "file size limit": found["limits"]["FSIZE"] != unlimited,
        "no new privileges": found["no_new_privs"] == 1,
        "seccomp filter": found["seccomp"] == 2,
        "no network sockets": not found["socket"],
        "network namespace": found["net"] is not None and found["net"] != here["net"],
        "process namespace": found["pid"] is not None and found["pid"] != here["pid"],
        "label files hidden": not found["labels"],
    }
