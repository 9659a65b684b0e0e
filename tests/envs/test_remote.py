"""Programs that run elsewhere score as they do here, and a server that dies takes no score along."""

import json
import os
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression

from etpo.cli.main import main
from etpo.envs.remote import TOKEN_VARIABLE, HttpServer, RemoteRunner, make_server
from etpo.envs.sandbox import SandboxError
from etpo.envs.sandbox.result import Failure, SplitResult
from etpo.envs.scoring import Scorer

TOKEN = "a token of the test"


class Fake:
    """Runs no program: `C = …` is a regression with that C, fitted on what came; all else is an error."""

    workers = 2

    def __init__(self, dies_after=None):
        self.jobs, self.dies_after, self.server = 0, dies_after, None

    def run(self, jobs, timeout_s=None):
        return [self._one(*job) for job in jobs]

    def _one(self, source, arrays, seed):
        self.jobs += 1
        if self.dies_after is not None and self.jobs > self.dies_after:
            raise ConnectionAbortedError("the machine is gone")  # no answer: the connection is closed
        if "C = " not in source:
            return SplitResult("error", None, Failure("NameError", "no C", 2), "said", 0.01)
        x_train, y_train, x_val = parts(arrays)
        model = LogisticRegression(C=float(source.rpartition("=")[2])).fit(x_train, y_train)
        return SplitResult("ok", model.predict_proba(x_val), None, "", 0.01)

    def cancel(self):
        pass

    def close(self):
        pass


def parts(arrays):
    n, m, f = np.frombuffer(os.pread(arrays.fd, 24, 0), np.uint64).astype(int)
    data = os.pread(arrays.fd, 8 * (n * f + n + m * f), 24)
    y = np.frombuffer(data, np.int64, n, 8 * n * f)
    x = np.frombuffer(data, np.float64)
    return x[: n * f].reshape(n, f), y, x[n * f + n :].reshape(m, f)


@pytest.fixture
def serve():
    servers = []

    def start(runner):
        server = make_server(runner, TOKEN)
        server.handle_error = lambda *args: None  # what a fake raises is no news
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_two_servers_one_of_which_dies_give_every_score_as_here(small, serve):
    programs = [f"C = {10 ** (i / 50 - 3):.6f}" if i % 7 else f"nothing {i}" for i in range(200)]
    here = Scorer(small, Fake()).score_many(programs)
    dying, staying = Fake(dies_after=40), Fake()
    runner = RemoteRunner([HttpServer(serve(dying), TOKEN), HttpServer(serve(staying), TOKEN)])
    assert runner.workers == 4
    assert Scorer(small, runner).score_many(programs) == here
    assert dying.jobs > 40
    assert runner.workers == 2
    assert len({score.reward for score in here}) > 10


def test_without_a_server_left_it_is_one_line(small, serve):
    runner = RemoteRunner([HttpServer(serve(Fake(dies_after=0)), TOKEN)])
    with pytest.raises(SandboxError, match="all of them have failed"):
        Scorer(small, runner).score("C = 1")


def test_the_token_is_asked_for(serve):
    address = serve(Fake())
    with pytest.raises(SandboxError, match="401"):
        RemoteRunner([HttpServer(address, "another")])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(address, b"{}")
    with pytest.raises(SandboxError, match=r"expected a server of programs at http://127\.0\.0\.1:9"):
        RemoteRunner([HttpServer("http://127.0.0.1:9", TOKEN)])


@pytest.mark.slow
def test_score_by_a_server_is_score_here(small, serve, sandbox, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("from sklearn.linear_model import LogisticRegression\n"
                       "return LogisticRegression().fit(x_train, y_train)\n")  # fmt: skip
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    said = [
        json.loads(CliRunner().invoke(main, ["score", str(program), "--dataset", "wine", *more]).output)
        for more in ([], ["--runner", serve(sandbox)])
    ]
    for one in said:
        del one["wall_s"]
    assert said[0] == said[1]
    assert said[0]["outcome"] == "ok"


def test_what_is_no_server_is_one_line(small, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("return 1\n")
    arguments = ["score", str(program), "--dataset", "wine", "--runner"]
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert TOKEN_VARIABLE in CliRunner().invoke(main, [*arguments, "http://127.0.0.1:9"]).output
    assert (
        "expected local, http://HOST:PORT, docker:IMAGE or podman:IMAGE"
        in CliRunner().invoke(main, [*arguments, "elsewhere"]).output
    )


def test_a_request_that_is_none_is_refused(serve):
    for body in (b"no JSON", b'{"jobs": [["x", 0, 24]], "timeout_s": 1}\n' + bytes(23)):
        request = urllib.request.Request(serve(Fake()), body, {"Authorization": f"Bearer {TOKEN}"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
