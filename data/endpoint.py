"""A client of OpenAI-compatible chat endpoints (vLLM, SGLang, hosted ones): retries, time-outs, no key on disk.

https://platform.openai.com/docs/api-reference/chat. A request per answer, so that each has a seed, a token count and a
retry of its own; servers with a prefix cache compute the prompt once all the same.
"""

import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from .task import Message

T = TypeVar("T")
MAX_REPLY = 64 * 2**20  # bytes
LONGEST_PAUSE = 60.0  # seconds
RETRIED = (408, 409, 425, 429)  # and all of 5xx
Finish = Literal["stop", "length", "aborted"]
FINISHES: Mapping[str, Finish] = {"stop": "stop", "tool_calls": "stop", "length": "length"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class EndpointError(ConnectionError):
    """An endpoint gave no answer, whatever was tried; the message says what it said and what to do."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an API; `url` is what comes before /chat/completions.

    `key_variable` is the *name* of the environment variable that holds the key, if the endpoint wants one; the key
    itself is never stored or shown, and is sent over https or within this machine only. `timeout` are the seconds for
    one answer, `attempts` how often it is asked for at most. Prices are per million tokens, in any currency. `extra`
    are further fields of every request, such as {"chat_template_kwargs": {"enable_thinking": false}}. What does not
    change the answers (where the model is served, how patiently it is asked) may change when a run goes on.
    """

    url: str = field(compare=False)
    model: str
    key_variable: str = field(default="", compare=False)
    concurrency: int = field(default=32, compare=False)
    timeout: float = field(default=600.0, compare=False)
    attempts: int = field(default=8, compare=False)
    pause: float = field(default=1.0, compare=False)
    price_in: float = field(default=0.0, compare=False)
    price_out: float = field(default=0.0, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            raise ValueError(f"the url of {parts.hostname} holds a secret or a query: give a key by key_variable only")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the endpoint's url is {self.url!r}: give http(s)://HOST[:PORT]/v1")
        if self.key_variable and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError(f"a key would be sent to {self.url} unencrypted: use https, or no key_variable")
        if not self.model or self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0 or self.pause < 0:
            raise ValueError(
                f"the endpoint {self.url} has model={self.model!r}, concurrency={self.concurrency}, "
                f"attempts={self.attempts}, timeout={self.timeout}, pause={self.pause}: name the model, and give at "
                "least 1 of concurrency and attempts and a positive timeout"
            )

    @property
    def name(self) -> str:
        """What data cards call it."""
        return self.model

    def identity(self, fingerprint: str) -> list[Any]:
        """What its rows' ids are made of: not where it is served, nor its version, which may change meanwhile."""
        return [self.model, dict(self.extra)]

    @property
    def host(self) -> str:
        """The host and port that answer."""
        return urlsplit(self.url).netloc


class Completion(NamedTuple):
    """An answer of an endpoint: a message without keys of None, why it ended, tokens in and out, who answered."""

    message: Message
    finish: Finish
    num_tokens: int
    prompt_tokens: int
    fingerprint: str


class Echo(NamedTuple):
    """Tokens given back: their text, and the log-probability of each, which the first has none of."""

    text: str
    logp: Sequence[Any]


class Client:
    """Asks one endpoint; safe to use from many threads.

    `counts` holds "requests", "retries", "prompt_tokens" and "tokens". Raises ValueError if the key's variable is not
    set.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.counts: Counter[str] = Counter()
        self._key = _key(endpoint)
        self._closed = threading.Event()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Have all threads give up at once, in the middle of a request too."""
        self._closed.set()
        with self._lock:
            waiting = list(self._open)
        for connection in waiting:
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has ended by itself

    def complete(
        self, messages: Sequence[Message], *, settings: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Completion:
        """One answer to a conversation; `settings` are fields of the request, such as temperature and seed.

        Raises:
            EndpointError: if it refuses, or `attempts` failed in a row.
        """
        request = {"model": self.endpoint.model, "messages": [dict(message) for message in messages], **settings}
        request |= {"tools": list(tools)} if tools else {}
        found = self._ask("chat/completions", request, lambda text: _completion(text, self.endpoint))
        self._count(tokens=found.num_tokens, prompt_tokens=found.prompt_tokens)
        return found

    def echo(self, tokens: Sequence[int]) -> Echo:
        """How likely each of some tokens is after those before it, by the older completions API, which vLLM has.

        Raises:
            EndpointError: as `complete` does, and if it does not give a number for each token.
        """
        request = {"model": self.endpoint.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 1}
        found = self._ask("completions", {**request, "echo": True, "logprobs": 0}, _echo)
        given = found.logp[: len(tokens)]  # one token more is asked for, as servers want
        if len(given) != len(tokens) or any(not isinstance(value, int | float) for value in given[1:]):
            raise EndpointError(
                f"{self.endpoint.url} gives {len(found.logp)} log-probabilities for {len(tokens)} tokens: it must "
                "support echo with logprobs on token ids, as vLLM does"
            )
        self._count(prompt_tokens=len(tokens))
        return Echo(found.text, given)

    def _ask(self, path: str, request: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """What a reply says, after as many attempts as it takes; `read` raises ValueError for one that is malformed."""
        body = json.dumps({**request, **self.endpoint.extra}).encode()
        begin, fault = time.monotonic(), ""
        for attempt in range(self.endpoint.attempts):
            if self._closed.is_set():
                raise EndpointError(f"{self.endpoint.url} is no longer asked")
            self._count(retries=min(attempt, 1))
            pause = None
            try:
                status, headers, text = self._post(path, body)
                if status == 200:
                    return read(text)
                fault = f"answers {status}: {self._excerpt(text)}"
                if status not in RETRIED and status < 500:
                    raise EndpointError(f"{self.endpoint.url} {fault}{_advice(status, self.endpoint)}")
                pause = headers.get("Retry-After")
            except EndpointError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                fault = f"gives no answer: {str(error) or type(error).__name__}"
            if attempt + 1 < self.endpoint.attempts:
                self._closed.wait(self._pause(attempt, pause))
        raise EndpointError(
            f"{self.endpoint.url} {fault} ({self.endpoint.attempts} attempts in {time.monotonic() - begin:.0f} s): see "
            "to the server or the url; all answers so far are saved, and the same command goes on with the rest"
        )

    def _pause(self, attempt: int, asked: str | None) -> float:
        """Seconds until the next attempt: doubling, with full jitter, and no shorter than the server asks for.

        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
        """
        jitter = random.uniform(0.0, min(LONGEST_PAUSE, self.endpoint.pause * 2.0**attempt))
        return jitter + (min(float(asked), LONGEST_PAUSE) if asked and asked.isdecimal() else 0.0)

    def _post(self, path: str, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        parts = urlsplit(self.endpoint.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.endpoint.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "posttrain"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._lock:
            self._open.add(connection)
        self._count(requests=1)
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/{path}", body, headers)
            reply = connection.getresponse()  # a redirect is an answer like others: the key goes to no other host
            return reply.status, reply.headers, _read(reply, time.monotonic() + self.endpoint.timeout)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)

    def _excerpt(self, text: bytes) -> str:
        shown = " ".join(text.decode(errors="replace").split())
        return (shown.replace(self._key, "***") if self._key else shown)[:300] or "(nothing)"


def _key(endpoint: Endpoint) -> str:
    if not endpoint.key_variable:
        return ""
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key:
        raise ValueError(
            f"the environment variable {endpoint.key_variable!r}, which is to hold the key of {endpoint.url}, is not "
            "set: export it, or name another"
        )
    return key


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole reply; a reply that trickles in past the deadline, or is too long, is an OSError."""
    pieces, size = [], 0
    while piece := reply.read1(2**16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_REPLY:
            raise OSError(f"its reply is longer than {MAX_REPLY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("its reply came too slowly")
    return b"".join(pieces)


def _completion(text: bytes, endpoint: Endpoint) -> Completion:
    """What a reply says. Raises ValueError for one that does not have the API's shape."""
    try:
        reply = json.loads(text)
        choice, usage = reply["choices"][0], reply["usage"]
        given = choice["message"]
        thinking = given.get("reasoning_content") or given.get("reasoning")
        message = {
            "role": "assistant",
            "content": _clean(given.get("content")),
            "reasoning_content": _clean(thinking),
            "tool_calls": [_call(call) for call in given.get("tool_calls") or ()] or None,
        }
        message = {name: value for name, value in message.items() if value is not None}
        if "content" not in message and "tool_calls" not in message:
            message["content"] = ""
        finish = FINISHES.get(choice["finish_reason"], "aborted")
        version = reply.get("system_fingerprint") or ""
        who = f"{reply.get('model') or endpoint.model} at {endpoint.host}{' ' if version else ''}{version}"
        return Completion(message, finish, int(usage["completion_tokens"]), int(usage["prompt_tokens"]), who)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        excerpt = text[:120].decode(errors="replace")
        raise ValueError(f"its reply is no chat completion ({error!r} in {excerpt!r})") from error


def _echo(text: bytes) -> Echo:
    """What a completion with echo says. Raises ValueError for one that does not have the API's shape."""
    try:
        choice = json.loads(text)["choices"][0]
        return Echo(str(choice["text"]), list(choice["logprobs"]["token_logprobs"]))
    except (KeyError, IndexError, TypeError) as error:
        excerpt = text[:120].decode(errors="replace")
        raise ValueError(f"its reply is no completion with log-probabilities ({error!r} in {excerpt!r})") from error


def _clean(text: str | None) -> str | None:
    """The text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return None if text is None else text.encode(errors="replace").decode()


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
    return {"id": call.get("id"), "type": "function", "function": function}


def _advice(status: int, endpoint: Endpoint) -> str:
    if status in (401, 403):
        variable = endpoint.key_variable or "(none is named: give key_variable)"
        return f" - check the key in the environment variable {variable}"
    if status == 404:
        return f" - check the url, which ends before /chat/completions, and the model {endpoint.model!r}"
    return ""
