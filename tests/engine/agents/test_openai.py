"""Agents behind an HTTP API, against a server on this machine that answers, is busy, fails and hangs up."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from etpo.cli.main import main
from etpo.engine.agents import AgentError, OpenAIAgent, agent_of
from etpo.engine.config import Config

KEY = "sk-a-secret-key"
GOOD = (
    "from sklearn.naive_bayes import GaussianNB\n\n\ndef build_model(x_train, y_train):\n"
    "    return GaussianNB().fit(x_train, y_train)\n"
)
ANSWER = f"Here it is:\n\n```python\n{GOOD}```\nIt is a simple model."


class Api(ThreadingHTTPServer):
    """Answers with what stands in `script`, one entry a request, then with `ANSWER`.

    An entry is a text to say, a (status, body, headers), or `cut` or `hang`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.seen: list[tuple[dict, dict]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(({"path": self.path, **self.headers}, body))
            entry = self.server.script.pop(0) if self.server.script else ANSWER
        if entry == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            return
        if entry == "hang":
            time.sleep(1.0)
            return
        status, content, headers = (200, chat(entry), {}) if isinstance(entry, str) else entry
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def chat(text: str | None, **usage: int) -> bytes:
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 20}
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


def failure(status: int, message: str, code: str | None = None, **headers: str) -> tuple[int, bytes, dict]:
    told = {"error": {"message": message, "code": code}}
    return status, json.dumps(told).encode(), {k.replace("_", "-"): v for k, v in headers.items()}


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Api()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def agent(api, waits) -> OpenAIAgent:
    return OpenAIAgent("gpt-x", api.url, KEY, max_tokens=99, timeout_s=0.3, retries=3, sleep=waits.append)


STATE = "# Task\ndef build_model(x_train, y_train):\n"


def test_a_request_and_its_answer(api, agent):
    reply = agent.ask(STATE, seed=7)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == (ANSWER, 100, 20)
    ((headers, body),) = api.seen
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["max_tokens"], body["seed"]) == ("gpt-x", 99, 7)
    assert STATE.rstrip() in body["messages"][0]["content"]
    assert "temperature" not in body
    OpenAIAgent("m", api.url, temperature=0.5).ask(STATE, 0)
    headers, body = api.seen[-1]
    assert body["temperature"] == 0.5
    assert "Authorization" not in headers


def test_a_busy_api_is_asked_again_after_longer_and_longer_waits(api, agent, waits):
    api.script = [failure(429, "slow down"), failure(503, "busy"), "cut", "done"]
    assert agent.ask(STATE, 0).text == "done"
    assert len(api.seen) == 4
    for wait, expected in zip(waits, (1, 2, 4), strict=True):
        assert 0.75 * expected <= wait <= 1.25 * expected


def test_the_wait_that_the_api_names_is_kept(api, agent, waits):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    api.script = [
        failure(429, "limit", Retry_After="7.5"),
        failure(429, "limit", Retry_After=later),
        failure(503, "limit", Retry_After="soon"),
        "done",
    ]
    assert agent.ask(STATE, 0).text == "done"
    assert waits[0] == 7.5
    assert 25 < waits[1] <= 30
    assert 3 <= waits[2] <= 5  # nothing that can be read: our own third wait


def test_no_answer_in_time_is_tried_again_and_then_an_error(api, agent, waits):
    api.script = ["hang"] * 4
    with pytest.raises(AgentError, match=r"expected an answer of gpt-x, got no answer in 0.3 s \(4 tries\)"):
        agent.ask(STATE, 0)
    assert len(waits) == 3


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (failure(401, f"Incorrect API key provided: {KEY}."), r"status 401 \(Incorrect API key provided: …"),
        (
            failure(404, "The model `gpt-x` does not exist"),
            r"status 404 \(The model `gpt-x` does not exist\)",
        ),
        (
            failure(429, "You exceeded your quota", "insufficient_quota"),
            r"status 429 \(You exceeded your quota",
        ),
        ((302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), "status 302"),
        ((400, b"<html>no</html>", {}), "status 400"),
    ],
)
def test_a_refusal_is_one_line_at_once_and_never_holds_the_key(api, agent, waits, entry, said):
    api.script = [entry]
    with pytest.raises(AgentError, match=said) as caught:
        agent.ask(STATE, 0)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(api.seen) == 1
    assert waits == []


def test_what_is_no_chat_completion_is_tried_again(api, agent):
    api.script = [(200, b"[]", {}), (200, b"{", {}), (200, chat(None), {})]
    assert agent.ask(STATE, 0).text == ""


@pytest.mark.parametrize(
    "usage", ["", ', "usage": null', ', "usage": {"prompt_tokens": 1e999, "completion_tokens": "7"}']
)
def test_an_api_that_does_not_count_tokens(api, agent, usage):
    api.script = [(200, f'{{"choices": [{{"message": {{"content": "x"}}}}]{usage}}}'.encode(), {})]
    reply = agent.ask(STATE, 0)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("x", None, None)


def test_one_refusal_stops_the_others_waits(api):
    agent = OpenAIAgent("gpt-x", api.url, KEY, timeout_s=5.0)
    api.script = [*[failure(429, "busy", Retry_After="500")] * 3, failure(401, "no")]
    with pytest.raises(AgentError, match="status 401"):
        agent.ask_many([STATE] * 4, seed=0)  # would take 500 s
    assert len(api.seen) == 4
    assert [reply.text for reply in agent.ask_many([STATE] * 2, seed=0)] == [ANSWER] * 2


@pytest.mark.parametrize("key", ["sk-a\nsecret", "sk-sécret"])
def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: expected printable ASCII") as caught:
        agent_of(Config(algo="reflection", agent="openai:m"))
    assert "cret" not in str(caught.value)


def test_the_newer_name_of_the_token_limit_is_found(api, agent, waits):
    api.script = [failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")]
    assert agent.ask(STATE, 0).text == ANSWER
    assert api.seen[-1][1]["max_completion_tokens"] == 99
    assert "max_tokens" not in api.seen[-1][1]
    assert waits == [0.0]


def test_requests_that_were_on_their_way_learn_the_other_name_too(api, waits):
    """Four requests are turned down together; the first answer must not make the others final."""
    together = threading.Barrier(4)

    class Waits(OpenAIAgent):
        def _refusal(self, error, *rest):
            together.wait(10.0)
            return super()._refusal(error, *rest)

    agent = Waits("gpt-x", api.url, KEY, timeout_s=5.0, retries=1, sleep=waits.append)
    api.script = [failure(400, "Use 'max_completion_tokens' instead.")] * 4
    assert [reply.text for reply in agent.ask_many([STATE] * 4, seed=0)] == [ANSWER] * 4
    assert ["max_tokens" in body for _, body in api.seen] == [True] * 4 + [False] * 4


def test_without_a_server_it_says_so(waits):
    agent = OpenAIAgent("m", "http://127.0.0.1:9/v1", retries=1, sleep=waits.append)
    with pytest.raises(AgentError, match=r"no connection \(ConnectionRefusedError\) \(2 tries\)"):
        agent.ask(STATE, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agent": "gpt-4"}, "expected openai:MODEL, got 'gpt-4'"),
        ({"agent": "openai:"}, "expected openai:MODEL"),
        ({"agent": "openai:m"}, "expected a key in OPENAI_API_KEY"),
        ({"agent": "openai:m", "base_url": "localhost:8000"}, "--base-url: expected a URL"),
        ({"agent": "openai:m", "base_url": "http://me:secret@host/v1"}, "without user, password"),
        ({"agent": "openai:m", "base_url": "http://host/v1?key=secret"}, "without user, password"),
        ({"agent": "openai:m", "algo": "etpo"}, "expected --algo reflection"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, changes, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=said) as caught:
        agent_of(Config(**{"algo": "reflection", **changes}))
    assert "secret" not in str(caught.value)


def run(api: Api, out: Path, *words: str):
    from click.testing import CliRunner

    options = ["train", "--algo", "reflection", "--agent", "openai:gpt-x", "--base-url", api.url,
               "--dataset", "wine", "--envs", "2", "--prompt-price", "5", "--completion-price", "15",
               "--out", str(out)]  # fmt: skip
    return CliRunner().invoke(main, [*options, *words])


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_reflects_counts_and_keeps_the_key_to_itself(api, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    api.script = ["```python\ndef build_model(x_train, y_train):\n    return nothing\n```"] * 2
    out = tmp_path / "run"
    result = run(api, out, "--steps", "6")
    assert result.exit_code == 0, result.output
    assert "The API counted 600 tokens sent and 120 written: 0.00 US dollars" in result.stdout
    programs = records(out / "programs.jsonl")
    assert [p["step"] for p in programs] == [1, 2, 3, 4, 5, 6]
    assert [p["outcome"] for p in programs] == ["error", "error", "ok", "ok", "ok", "ok"]
    assert programs[0]["text"] == "def build_model(x_train, y_train):\n    return nothing\n"
    assert programs[2]["text"] == GOOD
    assert "# Failed: line 2: NameError: name 'nothing' is not defined" in programs[2]["prompt"]
    assert programs[2]["prompt"].rstrip() in api.seen[2][1]["messages"][0]["content"]
    assert (programs[0]["prompt_tokens"], programs[0]["completion_tokens"]) == (100, 20)
    last = records(out / "metrics.jsonl")[-1]
    assert (last["prompt_tokens"], last["completion_tokens"]) == (600, 120)
    assert last["cost_usd"] == pytest.approx((600 * 5 + 120 * 15) / 1e6)
    assert last["kl_ref"] is None
    assert "openai:gpt-x" in (out / "report.html").read_text()
    assert KEY not in result.output
    for file in out.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
    assert (out / "best_program.py").is_file()


@pytest.mark.slow
def test_a_run_that_the_api_ends_is_saved_and_goes_on(api, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "run"
    api.script = ["    return 1\n", "    return 2\n", *[failure(401, "no more")] * 2]
    result = run(api, out, "--steps", "6")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "status 401 (no more)" in line
    assert f"2 programs are saved, go on with --resume {out}" in line
    from click.testing import CliRunner

    again = CliRunner().invoke(main, ["train", "--resume", str(out)])
    assert again.exit_code == 0, again.output
    programs = records(out / "programs.jsonl")
    assert [(p["env"], p["episode"], p["t"]) for p in programs[:4]] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
        (1, 0, 1),
    ]
    assert records(out / "metrics.jsonl")[-1]["prompt_tokens"] == 600
    refused = CliRunner().invoke(main, ["eval", str(out)])
    assert refused.exit_code == 2
    assert "has no weights here" in refused.stderr


def test_a_run_that_cannot_begin_leaves_nothing(api, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    api.script = [failure(404, "no such model")] * 2
    assert run(api, tmp_path / "run").exit_code == 1
    assert not (tmp_path / "run").exists()
