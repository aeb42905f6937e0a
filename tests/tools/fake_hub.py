"""A local hub: the part of the protocol that huggingface_hub's client uses, and its faults.

Two servers on 127.0.0.1: the hub itself, and the store of large files on another port, as the real
hub has one on another host. One repo at one commit. Every request is written down.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "abcd"
REPO = "org/tiny-mixtral"
PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"


@dataclass
class Request:
    """One request as it came: `where` is "hub" or "store"."""

    where: str
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Fault:
    """A fault in the answers to the next `times` requests for `path`, after the first `after`.

    It is an error, a connection cut off, a page of HTML, a range that begins some bytes `earlier`
    than requested, or one of the `LIES`, which comes as though it were the file. `headers` are
    added. With `ranged` it affects only requests for parts.
    """

    path: str
    times: float = float("inf")
    status: int = 0
    code: str | None = None
    body: bytes = b"{}"
    cut_after: int | None = None
    page: bool = False
    earlier: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = False
    after: int = 0
    lie: str = ""


def _repeated(data: bytes, size: int) -> bytes:
    return (data * (size // len(data) + 1))[:size]


# Replacements of a file's bytes, with the status and the headers of the file.
LIES: dict[str, Callable[[bytes], bytes]] = {
    "page": lambda data: _repeated(PAGE, len(data)),
    "json": lambda data: _repeated(b'{"error": "try later"} ', len(data)),
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "empty": lambda data: b"",
    "large": lambda data: data + bytes(150_000_000),
}


@dataclass
class FakeHub:
    """Use as a context manager; then `url` is its address.

    `files` maps names to content; those larger than `lfs_limit` bytes live in the store and have a
    SHA-256. `serve` replaces the content that is sent (not the one listed), `listing` edits the
    answer to a query.
    """

    files: dict[str, bytes]
    repo: str = REPO
    commit: str = COMMIT
    history: set[str] = field(default_factory=set)  # earlier commits, with the same files
    lfs_limit: int = 2_000
    serve: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    omit_headers: set[str] = field(default_factory=set)
    listing: Callable[[dict[str, Any]], Any] = lambda answer: answer
    ranges: bool = True
    delay: float = 0.0  # seconds between two pieces of `step` bytes from the store
    step: int = 1000
    slow: str = ""  # what the paths have in them that are delayed
    requests: list[Request] = field(default_factory=list)
    _hashes: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> FakeHub:
        self._servers = [self._start("hub"), self._start("store")]
        self.url, self.store_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )
        self.closing = threading.Event()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, path: str, **how: Any) -> None:
        """Add a `Fault` for requests whose path matches the regular expression `path`."""
        self.faults.append(Fault(path, **how))

    def got(self, where: str = "hub|store", method: str = "GET|HEAD") -> list[str]:
        """The paths asked for so far."""
        return [
            request.path
            for request in self.requests
            if re.fullmatch(where, request.where) and re.fullmatch(method, request.method)
        ]

    def is_lfs(self, name: str) -> bool:
        return len(self.files[name]) > self.lfs_limit

    def describe(self, name: str) -> dict[str, Any]:
        """A file as the hub lists it."""
        data = self.files[name]
        git_sha1, sha256 = self.hashes(name)
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1}
        if self.is_lfs(name):
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def hashes(self, name: str) -> tuple[str, str]:
        """Git's SHA-1 and the SHA-256 of a file, computed once: it may have gigabytes."""
        data = self.files[name]
        if self._hashes.get(name, (None,))[0] is not data:
            self._hashes[name] = (data, git_hash(data), hashlib.sha256(data).hexdigest())
        return self._hashes[name][1:]

    def take_fault(self, path: str, ranged: bool) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.path, path) and (ranged or not fault.ranged):
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _start(self, where: str) -> ThreadingHTTPServer:
        hub = self

        class Bound(_Handler):
            pass

        Bound.hub, Bound.where = hub, where
        server = _Server(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        # A short poll, so that a test does not wait half a second for the end.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, address: Any) -> None:
        """Say nothing of clients that hang up: some tests are about just that."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    where: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are two writes: without it each answer takes 40 ms
    )

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.requests.append(
            Request(self.where, self.command, path, headers["Range"], headers["Authorization"])
        )
        fault = self.hub.take_fault(path, headers["Range"] is not None)
        if fault is not None and fault.page:
            self.answer(200, PAGE, **{"Content-Type": "text/html; charset=utf-8"})
        elif fault is not None and fault.status:
            code = {"X-Error-Code": fault.code} if fault.code else {}
            self.answer(fault.status, fault.body, **code, **fault.headers)
        elif self.where == "store":
            self.send_file(path.lstrip("/"), fault)
        elif path.startswith("/api/"):
            self.look_up(path)
        else:
            self.resolve(path, fault)

    def look_up(self, path: str) -> None:
        match = re.fullmatch(rf"/api/models/{self.hub.repo}(?:/revision/(.+))?", path)
        if match is None:
            # The real hub answers so without a token, in order to hide which private repos exist.
            self.answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif match[1] not in (None, "main", self.hub.commit, *self.hub.history):
            self.answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [self.hub.describe(name) for name in sorted(self.hub.files)]
            commit = match[1] if match[1] in self.hub.history else self.hub.commit
            answer = {"id": self.hub.repo, "sha": commit, "siblings": siblings}
            body = self.hub.listing(answer)
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.answer(200, body, **{"Content-Type": "application/json"})

    def resolve(self, path: str, fault: Fault | None) -> None:
        match = re.fullmatch(rf"/{self.hub.repo}/resolve/([^/]+)/(.+)", path)
        asked = match[1] if match else ""
        commit = {"X-Repo-Commit": asked if asked in self.hub.history else self.hub.commit}
        if match is None or asked not in ("main", self.hub.commit, *self.hub.history):
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        elif match[2] not in self.hub.files or match[2] in self.hub.gone:
            self.answer(404, **{"X-Error-Code": "EntryNotFound"}, **commit)
        elif self.hub.is_lfs(match[2]):
            lfs = self.hub.describe(match[2])["lfs"]
            self.answer(
                302,
                **commit,
                **{"X-Linked-Size": str(lfs["size"]), "X-Linked-Etag": f'"{lfs["sha256"]}"'},
                Location=f"{self.hub.store_url}/{match[2]}",
            )
        else:
            self.send_file(match[2], fault, **commit)

    def send_file(self, name: str, fault: Fault | None, **headers: str) -> None:
        data = self.hub.serve.get(name, self.hub.files[name])
        if fault is not None and fault.lie:
            data = LIES[fault.lie](data)
        start, end, status = 0, len(data), 200
        if self.hub.ranges and (
            match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        ):
            start, status = max(0, int(match[1]) - (fault.earlier if fault else 0)), 206
            end = min(int(match[2]) + 1, len(data)) if match[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        headers["ETag"] = f'"{self.hub.hashes(name)[0]}"'
        cut = fault.cut_after if fault is not None else None
        self.answer(status, data[start:end], cut, **headers)

    def answer(
        self, status: int, body: bytes = b"", cut: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if name not in self.hub.omit_headers:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(body)[:cut]
        step = self.hub.step
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            if self.hub.delay and self.where == "store" and self.hub.slow in self.path:
                self.wfile.flush()
                if self.hub.closing.wait(self.hub.delay):
                    break
        if cut is not None or "Content-Length" in self.hub.omit_headers:
            self.close_connection = True


def git_hash(data: bytes) -> str:
    """Git's name for a file with this content."""
    digest = hashlib.sha1(b"blob %d\0" % len(data))
    digest.update(data)
    return digest.hexdigest()
