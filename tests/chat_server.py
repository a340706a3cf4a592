"""An OpenAI-compatible chat server on loopback; its answers are a function of the request, its faults are chosen.

python chat_server.py serves until its input ends, and prints its url first.
"""

import contextlib
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[int, dict[str, Any]], tuple[int, bytes] | None]


def answer(request: dict[str, Any]) -> str:
    """Right, wrong, or long, as a hash of seed and prompt has it; a prompt "reverse abc" has the answer "cba"."""
    prompt = request["messages"][-1]["content"]
    draw = hashlib.sha256(f"{request.get('seed')} {prompt}".encode()).digest()[0]
    letters = prompt.split()[-1]
    return letters[::-1] if draw < 128 else letters + str(draw)


def completion(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request."""
    text = answer(request)
    message = {"role": "assistant", "content": text, "tool_calls": None}
    usage = {"prompt_tokens": len(request["messages"][-1]["content"]), "completion_tokens": len(text)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"model": request["model"], "system_fingerprint": "fp1", "choices": [choice], "usage": usage}


def judged_or_answered(request: dict[str, Any]) -> dict[str, Any]:
    """The reply of a server that is a teacher and a judge."""
    made = completion(request)
    if "<answer>" in request["messages"][-1]["content"]:
        made["choices"][0]["message"]["content"] = f"Score: {len(answer(request)) % 11}"
    return made


class ChatServer(ThreadingHTTPServer):
    """Keeps every request with its headers; `fault(number, request)` may give another status and body."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fault: Fault = lambda *_: None, *, delay: float = 0.0, reply=completion) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.delay, self.reply = fault, delay, reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way, self.most_under_way = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def asked(self) -> Counter[str]:
        """How often each (prompt, seed) was asked for."""
        with self.lock:
            return Counter(f"{one['messages'][-1]['content']} {one['seed']}" for one in self.requests)

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
            self.server.headers.append({"path": self.path, **self.headers})
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        time.sleep(self.server.delay)
        fault = self.server.fault(number, request)
        status, body = fault or (200, json.dumps(self.server.reply(request)).encode())
        with self.server.lock:
            self.server.under_way -= 1
        if status == 0:
            self.close_connection = True  # no answer at all
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status in (302, 429):
            self.send_header(*{302: ("Location", "http://localhost:1/v1"), 429: ("Retry-After", "0")}[status])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(fault: Fault = lambda *_: None, **settings: Any) -> Iterator[ChatServer]:
    """A server that answers in threads of this process until the end of the block."""
    server = ChatServer(fault, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serving(delay=float(sys.argv[1]) if len(sys.argv) > 1 else 0.0) as running:
        print(running.url, flush=True)
        sys.stdin.read()
