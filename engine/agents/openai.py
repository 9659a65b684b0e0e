"""Models behind an OpenAI-compatible HTTP API, for the Reflection baseline: GPT-4 as in the paper, or any
local server.

The key comes from `OPENAI_API_KEY` and goes nowhere but into the request's header: not into messages, records
or config.toml, and not to another host, because redirects are not followed.
"""

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from etpo import EtpoError
from etpo.engine.config import Config
from etpo.engine.models.prompt_form import chat_message
from etpo.envs.answers import whole_text

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
PREFIX = "openai:"
RETRIED = (408, 409, 429, 500, 502, 503, 504, 529)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class AgentError(EtpoError):
    """The API refuses, or does not answer. One line; never holds the key."""


@dataclass(frozen=True)
class Reply:
    """What an agent said, and what it cost. Tokens are None where the server does not count them."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class _Retry(Exception):
    """A try that failed in a way that the next may not; `wait_s` where the server names one."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class OpenAIAgent:
    """A chat model behind `<base_url>/chat/completions`.

    Args:
        model: its name there.
        base_url: ends in `/v1` as a rule.
        key: sent as a bearer token; None sends none, as local servers want it.
        temperature, top_p, max_tokens: of sampling.
        timeout_s: for one answer.
        retries: further tries, with twice the wait each time, or the wait that the server names.
        sleep: waits; by default it ends early once `ask_many` has given up.

    Raises:
        ValueError: a key that no header can carry; the message does not hold it.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI_URL,
        key: str | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        timeout_s: float = 120.0,
        retries: int = 6,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE}: expected printable ASCII characters on one line, got others")
        self.model, self.base_url = model, base_url.rstrip("/")
        self.max_tokens, self.timeout_s, self.retries = max_tokens, timeout_s, retries
        self._given_up = threading.Event()
        self._key, self._sleep = key, sleep or self._given_up.wait
        # Left out where they say nothing: some models refuse any temperature.
        self._sampling = {
            name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value != 1.0
        }
        self._limit_name = "max_tokens"
        self._opener = urllib.request.build_opener(_NoRedirects())

    def ask(self, state: str, seed: int) -> Reply:
        """One answer to a state.

        Args:
            state: of an environment; put to the model as the chat form puts it.
            seed: sent along; servers that know no seeds ignore it.

        Raises:
            AgentError: refused, or no answer after all tries.
        """
        wait_s = FIRST_WAIT_S
        for tries_left in range(self.retries, -1, -1):
            try:
                return self._ask_once(state, seed)
            except _Retry as reason:
                if tries_left == 0:
                    raise AgentError(
                        f"{self.base_url}: expected an answer of {self.model}, got {reason} "
                        f"({self.retries + 1} tries); see --agent-retries and --agent-timeout-s"
                    ) from None
                # Not all at once: the environments' requests were turned down together.
                self._sleep(wait_s * random.uniform(0.75, 1.25) if reason.wait_s is None else reason.wait_s)
                if self._given_up.is_set():
                    raise AgentError("not asked again: another request was refused") from None
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("the last try returns or raises")

    def ask_many(self, states: Sequence[str], seed: int) -> list[Reply]:
        """Answers to several states, asked at the same time; state i with seed + i.

        Where one is refused, or Ctrl-C is pressed twice, the others are not asked again.

        Raises:
            AgentError: see `ask`.
        """
        self._given_up.clear()
        with ThreadPoolExecutor(max_workers=len(states)) as pool:
            futures = [pool.submit(self.ask, state, seed + i) for i, state in enumerate(states)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._given_up.set()
                raise
        return [future.result() for future in futures]

    def _ask_once(self, state: str, seed: int) -> Reply:
        limit_name = self._limit_name
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": chat_message(state)}],
            limit_name: self.max_tokens,
            "seed": seed,
            **self._sampling,
        }
        headers = {"Content-Type": "application/json", "User-Agent": "etpo"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return _read_reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error, limit_name) from None
        except TimeoutError:
            raise _Retry(f"no answer in {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Retry(f"no answer in {self.timeout_s:g} s") from None
            raise _Retry(f"no connection ({type(reason).__name__})") from None

    def _refusal(self, error: urllib.error.HTTPError, limit_name: str) -> Exception:
        """What an HTTP status other than 200 leads to; `limit_name` is what the request called max_tokens."""
        try:
            said = error.read(65_536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        message, kind = _message_of(said)
        if error.code == 400 and "max_completion_tokens" in message and limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # what newer models of OpenAI call it
            return _Retry("another name for max_tokens", 0.0)
        told = f"status {error.code}" + (f" ({self._without_key(message)})" if message else "")
        if error.code in RETRIED and kind != "insufficient_quota":
            return _Retry(told, _retry_after_s(error.headers.get("Retry-After")))
        hint = f"; set {KEY_VARIABLE}" if error.code in (401, 403) else "; see --agent and --base-url"
        return AgentError(f"{self.base_url}: expected an answer of {self.model}, got {told}{hint}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def agent_of(config: Config) -> OpenAIAgent:
    """The agent that a configuration names.

    Raises:
        ValueError: no such kind of agent, a URL that is none or may hold a secret, or no key for OpenAI.
    """
    name = config.agent or ""
    if not name.startswith(PREFIX) or name == PREFIX:
        raise ValueError(f"--agent: expected openai:MODEL, got {name!r}")
    url = config.base_url or OPENAI_URL
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--base-url: expected a URL such as http://localhost:8000/v1, got {url!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:  # config.toml would keep what stands there
        raise ValueError(f"--base-url: expected a URL without user, password, ? or #; the key belongs in "
                         f"{KEY_VARIABLE}")  # fmt: skip
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is None and url == OPENAI_URL:
        raise ValueError(f"--agent {name}: expected a key in {KEY_VARIABLE}, got none; set it, or name a "
                         "local server with --base-url")  # fmt: skip
    return OpenAIAgent(
        name.removeprefix(PREFIX), url, key, temperature=config.temperature, top_p=config.top_p,
        max_tokens=config.max_new_tokens, timeout_s=config.agent_timeout_s, retries=config.agent_retries,
    )  # fmt: skip


def _read_reply(raw: bytes) -> Reply:
    try:
        answer = json.loads(raw)
        text = answer["choices"][0]["message"].get("content") or ""
        usage = answer.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Retry("an answer that is no chat completion") from None
    if not isinstance(text, str):
        raise _Retry("an answer that is no text")
    prompt_tokens, completion_tokens = (n if type(n) is int and n >= 0 else None for n in counts)
    return Reply(whole_text(text), prompt_tokens, completion_tokens)


def _message_of(said: str) -> tuple[str, str]:
    """(message, code) of an API's error, the message cut to one short line."""
    try:
        error = json.loads(said)["error"]
        message, kind = (str(error.get(name) or "") for name in ("message", "code"))
    except (ValueError, LookupError, TypeError, AttributeError):
        message, kind = "", ""
    return " ".join(message.split())[:200], kind


def _retry_after_s(value: str | None) -> float | None:
    """Seconds from a Retry-After header, a number or a date; None where there is none."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 10 * LONGEST_WAIT_S) if seconds == seconds else None
