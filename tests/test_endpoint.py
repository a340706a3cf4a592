"""A client of chat endpoints: what it sends, what it makes of replies, retries and refusals; no key is ever shown."""

import time

import pytest
from chat_server import completion, serving

from posttrain.data.endpoint import Client, Endpoint, EndpointError
from posttrain.data.journal import Journal, read

PROMPT = ({"role": "user", "content": "reverse abc"},)
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
SETTINGS = {"temperature": 0.5, "seed": 3}


def ask(server, *, tools=(), **changes):
    endpoint = Endpoint(url=server.url, model="m", pause=0.01, **changes)
    client = Client(endpoint)
    return client, client.complete(PROMPT, settings=SETTINGS, tools=tools)


def test_a_request_holds_settings_tools_extras_and_the_key_of_the_named_variable(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with serving() as server:
        client, found = ask(server, key_variable="TEACHER_KEY", tools=TOOLS, extra={"top_k": 5})
    [request], [headers] = server.requests, server.headers
    assert request == {
        "model": "m", "messages": list(PROMPT), **SETTINGS, "tools": list(TOOLS), "top_k": 5
    }  # fmt: skip
    assert (headers["path"], headers["Authorization"]) == ("/v1/chat/completions", "Bearer sk-secret")
    assert found.message["role"] == "assistant" and set(found.message) == {"role", "content"}
    assert (found.finish, found.num_tokens, found.prompt_tokens) == ("stop", len(found.message["content"]), 11)
    assert found.fingerprint == f"m at 127.0.0.1:{server.server_port} fp1"
    assert "sk-secret" not in repr(client.endpoint) + str(vars(client.endpoint))


def test_thinking_and_tool_calls_of_a_reply_are_kept():
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "add", "arguments": '{"x": 2}'}}

    def reply(request):
        made = completion(request)
        made["choices"][0]["message"] = {"content": None, "reasoning": "two \ud800", "tool_calls": [call]}
        made["choices"][0]["finish_reason"] = "tool_calls"
        return made

    with serving(reply=reply) as server:
        _, found = ask(server)
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}]
    assert found.message == {"role": "assistant", "reasoning_content": "two ?", "tool_calls": calls}
    assert found.finish == "stop"


@pytest.mark.parametrize(
    "fault", [(500, b"oops"), (429, b"slow down"), (0, b""), (200, b"{"), (200, b'{"choices": []}')]
)
def test_a_fault_that_passes_is_retried(fault):
    with serving(lambda number, _: fault if number < 2 else None) as server:
        client, found = ask(server, attempts=3)
    assert found.finish == "stop" and client.counts["requests"] == 3 and client.counts["retries"] == 2


def test_a_fault_that_stays_ends_in_one_sentence():
    with serving(lambda *_: (503, b"no model\nyet")) as server, pytest.raises(EndpointError) as raised:
        ask(server, attempts=3)
    assert len(server.requests) == 3
    text = str(raised.value)
    assert text.startswith(f"{server.url} answers 503: no model yet (3 attempts in 0 s)") and "\n" not in text
    assert "the same command goes on" in text


@pytest.mark.parametrize(("status", "advice"), [(400, ""), (401, "TEACHER_KEY"), (404, "the model 'm'"), (302, "")])
def test_a_refusal_is_not_asked_again_and_never_shows_the_key(status, advice, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    refusal = lambda *_: (status, b"bad key sk-secret")  # noqa: E731
    said = pytest.raises(EndpointError, match=rf"answers {status}: bad key \*\*\*.*{advice}")
    with serving(refusal) as server, said as e:
        ask(server, key_variable="TEACHER_KEY")
    assert len(server.requests) == 1 and "sk-secret" not in str(e.value)


def test_nobody_at_the_url_and_a_server_too_slow_are_said():
    with serving() as server:
        pass
    with pytest.raises(EndpointError, match=r"gives no answer: .*refused.* \(2 attempts"):
        ask(server, attempts=2)
    begin = time.monotonic()
    with serving(delay=2.0) as server, pytest.raises(EndpointError, match="gives no answer: timed out"):
        ask(server, attempts=1, timeout=0.1)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"url": "localhost:8000/v1"}, "give http"),
        ({"url": "https://user:secret@host/v1"}, "key_variable only"),
        ({"url": "http://10.0.0.1/v1", "key_variable": "K"}, "unencrypted"),
        ({"model": ""}, "name the model"),
        ({"concurrency": 0}, "at least 1"),
    ],
)
def test_endpoints_that_cannot_be_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        Endpoint(**{"url": "https://host/v1", "model": "m", **settings})


def test_a_key_that_is_not_set_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable 'NO_SUCH_KEY', .* is not set: export it"):
        Client(Endpoint(url="https://host/v1", model="m", key_variable="NO_SUCH_KEY"))


def test_a_journal_goes_on_behind_a_torn_line(tmp_path):
    file = tmp_path / "deep" / "lines.jsonl"
    with Journal(file) as lines:
        lines.append([{"n": 1}, {"text": "\ud800é"}])
        lines.sync()
    file.write_bytes(file.read_bytes() + b'{"n": 3')
    assert len(list(read(file))) == 2
    with Journal(file) as lines:
        lines.append([{"n": 3}])
    assert list(read(file)) == [{"n": 1}, {"text": "\ud800é"}, {"n": 3}]
    file.write_bytes(b'{"n": 1\n{"n": 2}\n')
    with pytest.raises(ValueError, match="line 1 of .*lines.jsonl is no JSON"):
        list(read(file))
