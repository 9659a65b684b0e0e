"""`--runner docker:IMAGE` or `podman:IMAGE`: the server of programs in a container of one's own.

The container has no network, not even a published port: requests and answers go through its standard input
and output, each behind its length. It reads its image only, and ends when the trainer does. Programs run in
the same box inside it as without it; the container is a wall around that. The image needs etpo, nothing else.
"""

import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import IO

from etpo.envs.sandbox import SandboxError

ENGINES = ("docker", "podman")
LENGTH = struct.Struct(">Q")
MAX_ANSWER_BYTES = 2**30
LOOK_S = 30.0
WORKER_MIB = 2048 + 512  # what a program may allocate, and what the libraries take
SERVER_MIB = 1024
PIDS_A_WORKER = 256


def command_of(engine: str, image: str, mode: str, workers: int) -> list[str]:
    """The command line that starts the server: no network, no rights, nothing to write but /tmp, limits."""
    memory = f"{workers * WORKER_MIB + SERVER_MIB}m"
    return [
        engine, "run", "--rm", "--interactive", "--network", "none", "--read-only", "--tmpfs", "/tmp:size=1g",
        "--memory", memory, "--memory-swap", memory, "--cpus", str(workers),
        "--pids-limit", str(PIDS_A_WORKER * (workers + 1)), "--cap-drop", "ALL", "--user", "65534:65534",
        "--security-opt", "no-new-privileges", image, "etpo", "serve-sandbox", "--stdio", "--sandbox", mode,
    ]  # fmt: skip


def check_engine(engine: str) -> None:
    """SandboxError, in one line, where the engine is not there or does not answer."""
    go_on = "or give --runner local"
    if shutil.which(engine) is None:
        raise SandboxError(
            f"--runner {engine}: expected the command {engine}, got none on PATH; install it, {go_on}"
        )
    try:
        found = subprocess.run([engine, "info"], capture_output=True, text=True, timeout=LOOK_S)
        said, is_there = found.stderr, found.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, is_there = str(error), False
    if not is_there:
        raise SandboxError(
            f"--runner {engine}: expected {engine} to answer `{engine} info`, got: "
            f"{_last_line(said) or 'nothing'}; start its service, {go_on}"
        )


class Container:
    """A server of programs in a container, asked through its pipes; see `check_engine` first."""

    def __init__(self, engine: str, image: str, mode: str = "default") -> None:
        self.name = f"{engine}:{image}"
        self._one_at_a_time = threading.Lock()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the container
        self._process = subprocess.Popen(
            command_of(engine, image, mode, len(os.sched_getaffinity(0))),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            start_new_session=True,  # Ctrl-C is for the trainer, which saves first
        )  # fmt: skip

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        """The answer to a request; OSError where none comes in time: what the container said last."""
        pipe = self._process.stdin
        assert pipe is not None
        with self._one_at_a_time:
            end = threading.Timer(timeout_s, self._process.kill)
            end.start()
            try:
                pipe.write(LENGTH.pack(len(body)) + body)
                pipe.flush()
                (size,) = LENGTH.unpack(self._read(LENGTH.size))
                if size > MAX_ANSWER_BYTES:
                    raise OSError(f"an answer of {size} bytes")
                return self._read(size)
            except OSError as error:
                self._process.kill()  # what it still sends would be taken for the next answer
                raise OSError(self._last_words() or str(error)) from error
            finally:
                end.cancel()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise OSError("no answer")
        return data

    def _last_words(self) -> str:
        self._process.wait()
        self._said.seek(0)
        return _last_line(self._said.read().decode("utf-8", "replace"))

    def close(self) -> None:
        """Have the server end, and wait for it."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


def serve(answer: Callable[[bytes], bytes], requests: IO[bytes], answers: IO[bytes]) -> None:
    """The other side: answer requests until there are no more. An answer of no bytes refuses a request."""
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        body = requests.read(*LENGTH.unpack(head))
        try:
            said = answer(body)
        except (ValueError, KeyError, TypeError):
            said = b""
        answers.write(LENGTH.pack(len(said)) + said)
        answers.flush()


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
