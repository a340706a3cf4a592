"""A bucket on loopback: as much of Google Cloud Storage's JSON API as gcsfs, its own client and TensorStore ask for.

https://cloud.google.com/storage/docs/json_api. Objects are in memory, whatever the bucket is called.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = r"(?:/upload|/download)?/storage/v1/b/[^/]+"


class Bucket(ThreadingHTTPServer):
    """A running server.

    `delay` are seconds that each write takes; `refusal` is the status of every answer, if any; `full` are bytes that
    one more object may have.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, bytes] = {}
        self.numbers, self.lock = itertools.count(1), threading.RLock()
        self.delay, self.refusal, self.full = 0.0, 0, 2**62
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What points the clients here, with credentials that are none."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        token = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, **token}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


@contextlib.contextmanager
def running() -> Iterator[Bucket]:
    """A bucket until the end of the block."""
    made = Bucket()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""

    def _do(self) -> None:
        body, url = self._body(), urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        if self.server.refusal:
            return self._fail(self.server.refusal, "no access")
        if re.fullmatch(BUCKET + "(/storageLayout)?", url.path):
            return self._answer(200, {"name": "bucket", "hierarchicalNamespace": {"enabled": False}})
        if re.fullmatch(BUCKET + "/o", url.path):
            return self._upload(query, body) if url.path.startswith("/upload") else self._list(query)
        if found := re.fullmatch(BUCKET + "/o/(.+)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)", url.path):
            return self._copy(*map(urllib.parse.unquote, found.groups()))
        found = re.fullmatch(BUCKET + "/o/(.+)", url.path)
        name = urllib.parse.unquote(found[1]) if found else ""
        with self.server.lock:
            if name not in self.server.objects:
                return self._fail(404, f"No such object: {name}")
            if self.command == "DELETE":
                del self.server.objects[name]
                return self._answer(204)
        whole = query.get("alt") == "media" or url.path.startswith("/download")
        return self._content(name) if whole else self._answer(200, self._about(name))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _do

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, body: bytes | dict = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, code: int, message: str) -> None:
        self._answer(code, {"error": {"code": code, "message": message}})

    def _about(self, name: str) -> dict[str, Any]:
        content, number = self.server.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        numbers = {"generation": str(number), "metageneration": "1", "size": str(len(content)), "md5Hash": digest}
        return {"kind": "storage#object", "bucket": "bucket", "name": name, **numbers, **times}

    def _content(self, name: str) -> None:
        content, number = self.server.objects[name]
        headers = {"Content_Type": "application/octet-stream", "x_goog_generation": str(number)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self._answer(200, content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if first > last:
            return self._answer(416)
        where = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], **headers, Content_Range=where)

    def _put(self, name: str, content: bytes, only_if: str | None = None) -> None:
        time.sleep(self.server.delay)
        if len(content) > self.server.full:
            return self._fail(403, "The quota has been exceeded: storage")
        with self.server.lock:
            now = str(self.server.objects[name][1]) if name in self.server.objects else "0"
            if only_if not in (None, now):
                return self._fail(412, "conditionNotMet")
            self.server.objects[name] = content, next(self.server.numbers)
            about = self._about(name)
        self._answer(200, about)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            self.server.uploads[query["upload_id"]] += body
            content = self.server.uploads[query["upload_id"]]
            if self.headers.get("Content-Range", "").endswith("/*"):  # more is to come
                return self._answer(308, b"", **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))
            return self._put(query["name"], content)
        if query["uploadType"] == "resumable":
            name, number = query.get("name") or json.loads(body)["name"], str(next(self.server.numbers))
            self.server.uploads[number] = b""
            more = urllib.parse.urlencode({"uploadType": "resumable", "upload_id": number, "name": name})
            there = f"http://{self.headers['Host']}{urllib.parse.urlparse(self.path).path}?{more}"
            return self._answer(200, Location=there)
        if query["uploadType"] == "multipart":
            about, content = _parts(self.headers["Content-Type"], body)
            return self._put(json.loads(about)["name"], content)
        return self._put(query["name"], body, query.get("ifGenerationMatch"))

    def _copy(self, source: str, target: str) -> None:
        if source not in self.server.objects:
            return self._fail(404, f"No such object: {source}")
        with self.server.lock:
            self.server.objects[target] = self.server.objects[source][0], next(self.server.numbers)
            about = self._about(target)
        sizes = {"objectSize": about["size"], "totalBytesRewritten": about["size"]}
        return self._answer(200, {"done": True, **sizes, "resource": about} if "rewriteTo" in self.path else about)

    def _list(self, query: dict[str, str]) -> None:
        prefix, mark = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        with self.server.lock:
            for name in sorted(self.server.objects):
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if query.get("endOffset") and name >= query["endOffset"]:
                    continue
                rest = name.removeprefix(prefix)
                if mark and mark in rest:
                    folders.add(prefix + rest.partition(mark)[0] + mark)
                else:
                    items.append(self._about(name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})


def _parts(kind: str, body: bytes) -> list[bytes]:
    """The two parts of an upload that holds what describes the object and its content."""
    mark = b"--" + kind.partition("boundary=")[2].strip("'\"").encode()
    return [
        re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
        for part in body.split(mark)[1:3]
    ]
