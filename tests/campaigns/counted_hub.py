"""A fake hub in a process of its own, which counts the bytes that it sends."""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


class Hub:
    """A hub in another process, serving the files of a directory and counting what it sends."""

    def __init__(self, directory: Path, step: int = 1 << 16, delay: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.url = self.set(step=step, delay=delay)["url"]
        os.environ["HF_ENDPOINT"] = self.url

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def set(self, **settings: Any) -> dict[str, Any]:
        """Set `step`, `delay`, `session`, `directory` (of the files), `siblings` (more of them in
        the listing), `listing` (its other keys), `faults` (the keys of `Fault`; they replace the
        earlier ones) or `omit` (headers); return the log if `log` is set."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(settings), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def log(self) -> list[dict[str, Any]]:
        """Return the requests since the last call: where, name, first, last, sent, session."""
        entries: list[dict[str, Any]] = self.set(log=True)["log"]
        return entries

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve(directory: Path) -> None:
    import fake_hub

    log: list[dict[str, Any]] = []
    session = [0]
    fake_hub.git_hash = functools.lru_cache(fake_hub.git_hash)

    class Handler(fake_hub._Handler):
        def setup(self) -> None:
            # A small buffer, so that nearly all bytes that are sent also arrive.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            super().setup()

        def do_GET(self) -> None:
            first, _, last = (self.headers["Range"] or "bytes=0-")[6:].partition("-")
            name = self.path.partition("?")[0].rsplit("/", 1)[-1]
            entry = {"where": self.where, "name": name, "method": self.command, "sent": 0}
            entry |= {"first": int(first), "last": last and int(last), "session": session[0]}
            log.append(entry)
            write = self.wfile.write
            self.wfile.write = lambda data: self._count(entry, write, data)  # type: ignore
            try:
                super().do_GET()
            finally:
                self.wfile.write = write  # type: ignore[method-assign]

        do_HEAD = do_GET

        def _count(self, entry: Any, write: Callable[[Any], int], data: Any) -> int:
            # Parts of a body are memoryviews, headers are bytes.
            done = write(data)
            entry["sent"] += len(data) if isinstance(data, memoryview) else 0
            return done

    fake_hub._Handler = Handler  # type: ignore[misc]

    class Cached(fake_hub.FakeHub):
        @functools.lru_cache  # noqa: B019 - it lives as long as the process
        def describe(self, name: str) -> dict[str, Any]:
            return super().describe(name)

        __hash__ = object.__hash__

    def files(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    with Cached(files(directory)) as hub:
        for line in sys.stdin:
            settings = json.loads(line)
            hub.step, hub.delay = settings.get("step", hub.step), settings.get("delay", hub.delay)
            session[0] = settings.get("session", session[0])
            if "directory" in settings:
                Cached.describe.cache_clear()
                hub.files = files(Path(settings["directory"]))
            if "faults" in settings:
                hub.faults = [fake_hub.Fault(**fault) for fault in settings["faults"]]
            hub.omit_headers = set(settings.get("omit", hub.omit_headers))
            if "listing" in settings or "siblings" in settings:
                extra, more = settings.get("listing", {}), settings.get("siblings", [])
                hub.listing = lambda answer, extra=extra, more=more: {
                    **answer,
                    "siblings": answer["siblings"] + more,
                    **extra,
                }
            print(
                json.dumps({"url": hub.url, "log": log if settings.get("log") else []}), flush=True
            )
            if settings.get("log"):
                log.clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    _serve(parser.parse_args().directory)
