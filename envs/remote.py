"""Programs run on other machines: `etpo serve-sandbox` there, a `RemoteRunner` here. Labels stay here.

A request is a batch of jobs, an answer their results: a line of JSON, then raw arrays; nothing is pickled.
What a server says is trusted as little as what a program says. Who has the token may run programs, and
nothing is encrypted: give the server a network of your own, or a tunnel.
"""

import hmac
import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np

from etpo.envs.container import ENGINES, Container, check_engine
from etpo.envs.runner import Runner
from etpo.envs.sandbox import Sandbox, SandboxError, SplitArrays
from etpo.envs.sandbox.box import wire
from etpo.envs.sandbox.result import Failure, SplitResult

Job = tuple[str, SplitArrays, int]
TOKEN_VARIABLE = "ETPO_RUNNER_TOKEN"
MAX_REQUEST_BYTES = 2**30
CONNECT_S = 30.0


class Server(Protocol):
    """What runs programs somewhere else: a request's bytes in, an answer's out."""

    name: str

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        """The answer to a request; to an empty one, how many workers there are. OSError where none comes."""

    def close(self) -> None:
        """Let it go."""


class HttpServer:
    """`etpo serve-sandbox` at an address; it goes on when it is closed here, for others may use it.

    Args:
        name: its address, `http://host:port`.
        token: what the server was started with.
    """

    def __init__(self, name: str, token: str) -> None:
        self.name = name
        self._token = token

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        request = urllib.request.Request(self.name, body or None, {"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            said: bytes = answer.read(MAX_REQUEST_BYTES)
        return said

    def close(self) -> None:
        pass


class RemoteRunner:
    """Spreads jobs over servers; those of a server that fails are run by the others. A `Runner`.

    Args:
        servers: at least one; closed with the runner.
        timeout_s: processor seconds for a job that has no limit of its own.

    Raises:
        SandboxError: a server does not answer, or refuses the token.
    """

    def __init__(self, servers: Iterable[Server], timeout_s: float = 10.0) -> None:
        self._servers = list(servers)
        self._timeout_s = timeout_s
        self._workers_at: dict[Server, int] = {}
        for server in self._servers:
            try:
                told = json.loads(server.ask(b"", CONNECT_S))
                self._workers_at[server] = max(1, int(told["workers"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.close()
                raise SandboxError(f"expected a server of programs at {server.name}, got: {error}") from error

    @property
    def workers(self) -> int:
        return sum(self._workers_at.values())

    def run(self, jobs: Iterable[Job], timeout_s: float | None = None) -> list[SplitResult]:
        """Results in the order of the jobs. SandboxError where no server is left."""
        asked = list(jobs)
        limit_s = timeout_s or self._timeout_s
        results: list[SplitResult | None] = [None] * len(asked)
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(asked)):
            waiting.put(index)
        while None in results and self._workers_at:
            threads = [
                threading.Thread(target=self._work, args=(server, asked, limit_s, waiting, results))
                for server in self._workers_at
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        found = [result for result in results if result is not None]
        if len(found) < len(asked):
            raise SandboxError("expected a server that runs programs, got none: all of them have failed")
        return found

    def cancel(self) -> None:
        """Nothing is under way between two calls of `run`."""

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def _work(
        self,
        server: Server,
        jobs: Sequence[Job],
        timeout_s: float,
        waiting: "queue.SimpleQueue[int]",
        results: list[SplitResult | None],
    ) -> None:
        """Have one server run what waits, as many jobs at a time as it has workers; forget it if it fails."""
        while chunk := _take(waiting, self._workers_at[server]):
            try:
                body = pack_jobs([jobs[index] for index in chunk], timeout_s)
                # Each job may be tried for twice its limit, and what another asks for comes first.
                answer = server.ask(body, CONNECT_S + 4 * wire.WALL_CEILING * timeout_s)
                for index, result in zip(chunk, unpack_results(answer), strict=True):
                    results[index] = result
            except (OSError, ValueError, KeyError, TypeError):
                for index in chunk:
                    results[index] = None
                    waiting.put(index)
                del self._workers_at[server]
                return


def open_runner(where: str, mode: str = "default", timeout_s: float = 10.0) -> Runner:
    """What `--runner` says: a sandbox here, servers elsewhere, or a container.

    Args:
        where: `local`; `http://HOST:PORT,…` (or https), with the token of the environment; `docker:IMAGE` or
            `podman:IMAGE`.
        mode: of the sandbox here or in the container; servers have their own.

    Raises:
        ValueError: it is none of these. SandboxError: there is no token, no engine, or no server.
    """
    check_runner(where, mode)
    if where == "local":
        return Sandbox(mode, timeout_s)
    engine, _, image = where.partition(":")
    if engine in ENGINES:
        return RemoteRunner([Container(engine, image, mode)], timeout_s)
    token = os.environ[TOKEN_VARIABLE]
    return RemoteRunner([HttpServer(address, token) for address in where.split(",")], timeout_s)


def check_runner(where: str, mode: str = "default") -> None:
    """Say what is wrong with `open_runner`'s arguments before anything starts; it raises the same."""
    engine, _, image = where.partition(":")
    if where == "local":
        return
    if engine in ENGINES and image and not image.startswith("-"):
        if mode == "off":
            raise ValueError(f"--sandbox off: expected strict or default beside --runner {where}")
        check_engine(engine)
    elif all(address.startswith(("http://", "https://")) for address in where.split(",")):
        if not os.environ.get(TOKEN_VARIABLE):
            raise SandboxError(f"expected the servers' token in {TOKEN_VARIABLE}, got none")
    else:
        raise ValueError(
            f"--runner: expected local, http://HOST:PORT, docker:IMAGE or podman:IMAGE, got {where!r}"
        )


def _take(waiting: "queue.SimpleQueue[int]", most: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < most:
        try:
            taken.append(waiting.get_nowait())
        except queue.Empty:
            break
    return taken


def pack_jobs(jobs: Sequence[Job], timeout_s: float) -> bytes:
    """A request: {"timeout_s", "jobs": [[source, seed, bytes of its arrays]]} on a line, then the arrays."""
    raw = [os.pread(arrays.fd, os.fstat(arrays.fd).st_size, 0) for _, arrays, _ in jobs]
    told = [[source, seed, len(data)] for (source, _, seed), data in zip(jobs, raw, strict=True)]
    return b"\n".join([json.dumps({"timeout_s": timeout_s, "jobs": told}).encode(), b"".join(raw)])


def unpack_jobs(body: bytes) -> tuple[list[Job], float]:
    """The jobs of a request, and the limit; ValueError, KeyError or TypeError where it is none."""
    head, _, data = body.partition(b"\n")
    told = json.loads(head)
    jobs, start = [], 0
    for source, seed, size in told["jobs"]:
        jobs.append((str(source), _arrays(data[start : start + size]), int(seed)))
        start += size
    return jobs, float(told["timeout_s"])


def _arrays(data: bytes) -> SplitArrays:
    if len(data) < wire.ARRAYS.size:
        raise ValueError(f"expected arrays, got {len(data)} bytes")
    n_train, n_val, features = wire.ARRAYS.unpack_from(data)
    sizes = (n_train * features, n_train, n_val * features)
    if len(data) != wire.ARRAYS.size + 8 * sum(sizes):
        raise ValueError(f"expected arrays of {8 * sum(sizes)} bytes, got {len(data)}")
    starts = [wire.ARRAYS.size + 8 * sum(sizes[:i]) for i in range(3)]
    x_train = np.frombuffer(data, np.float64, sizes[0], starts[0]).reshape(n_train, features)
    y_train = np.frombuffer(data, np.int64, sizes[1], starts[1])
    return SplitArrays(
        x_train, y_train, np.frombuffer(data, np.float64, sizes[2], starts[2]).reshape(n_val, features)
    )


def pack_results(results: Sequence[SplitResult]) -> bytes:
    """An answer: a line of JSON with all but the probabilities; then those, one after another."""
    told = []
    for result in results:
        failure = None if result.failure is None else asdict(result.failure)
        shape = None if result.proba is None else result.proba.shape
        told.append([result.outcome, failure, result.stdout, result.wall_s, result.precision, shape])
    raw = (np.ascontiguousarray(r.proba, np.float64).tobytes() for r in results if r.proba is not None)
    return b"\n".join([json.dumps(told).encode(), b"".join(raw)])


def unpack_results(answer: bytes) -> list[SplitResult]:
    """The results of an answer; ValueError, KeyError or TypeError where it is none."""
    head, _, data = answer.partition(b"\n")
    results, start = [], 0
    for outcome, told, stdout, wall_s, precision, shape in json.loads(head):
        failure = None if told is None else Failure(str(told["kind"]), str(told["message"]), told["line"])
        proba = None
        if shape is not None:
            proba = np.frombuffer(data, np.float64, math.prod(shape), start).reshape(shape)
            start += proba.nbytes
        if outcome not in wire.OUTCOMES or (outcome == "ok") != (proba is not None):
            raise ValueError(f"expected an outcome of {', '.join(wire.OUTCOMES)}, got {outcome!r}")
        results.append(SplitResult(outcome, proba, failure, str(stdout), float(wall_s), float(precision)))
    return results


def make_answer(runner: Runner) -> Callable[[bytes], bytes]:
    """What a server does with a request: an empty one asks for the number of workers, others have jobs run.

    Batches run one after another. ValueError, KeyError or TypeError where the request is none.
    """
    one_at_a_time = threading.Lock()

    def answer(body: bytes) -> bytes:
        if not body:
            return json.dumps({"workers": runner.workers}).encode()
        jobs, timeout_s = unpack_jobs(body)
        with one_at_a_time:
            return pack_results(runner.run(jobs, timeout_s))

    return answer


def make_server(runner: Runner, token: str, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that runs batches of jobs, one after another; start it by `serve_forever`."""
    answer = make_answer(runner)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                self.send_error(401)
                return
            size = int(self.headers.get("Content-Length") or 0)
            if size > MAX_REQUEST_BYTES:
                self.send_error(413)
                return
            try:
                said = answer(self.rfile.read(size))
            except (ValueError, KeyError, TypeError) as error:
                self.send_error(400, " ".join(str(error).split())[:200])
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            """Programs are many: no line for each."""

    return ThreadingHTTPServer((host, port), Handler)
