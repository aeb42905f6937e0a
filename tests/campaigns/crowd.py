"""Crowds of strangers at a server that may open 1,024 files, while a good client asks it.

Each crowd has 1,300 connections: some that stay silent, some that come again when they are closed,
and some that begin a request and never end it. The good client has to get all its answers in time.
The server has to keep descriptors for itself, to say nothing of the strangers, and to end when it
is told to.

    python tests/campaigns/crowd.py [--count 1300] [--files 1024] [--seconds 30]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from hostile_request_kinds import HANG, Target
from hostile_requests import WEB, start_good_client
from rig import parsed, table, told, workplace
from strangers import Crowd

CROWDS = {
    "silence": Crowd(comes_again=False),
    "silence, again and again": Crowd(),
    "half a request": Crowd(b"POST /v1/chat/completions HTTP/1.1\r\nhost: local"),
    "requests for nothing": Crowd(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"),
}
_LONGEST_S = 20.0  # that the good client may wait for an answer
_OWN_FILES = 100  # that strangers must leave


def main() -> int:
    """Run the campaign and return the exit code."""
    options = parsed(__doc__, count=1300, files=1024, seconds=30)
    faults: list[str] = []
    with workplace():
        for name, crowd in CROWDS.items():
            began = time.monotonic()
            results = _visited(name, crowd, options, faults)
            seconds = time.monotonic() - began
            table(f"{name}: {options.count} connections, {seconds:.0f} s", results)
    return told(faults)


def _visited(name: str, crowd: Crowd, options: object, faults: list[str]) -> dict[str, object]:
    """Let a crowd visit a server; return what a table shows."""
    count, files, seconds = (getattr(options, each) for each in ("count", "files", "seconds"))
    process = subprocess.Popen(
        [sys.executable, str(WEB / "fake_serve.py"), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert process.stderr is not None
    try:
        target = Target(int(process.stderr.readline().split("/")[2].rpartition(":")[2]))
        process.stderr.readline()  # the context's size
        over = threading.Event()
        came: list[int] = []
        visit = threading.Thread(
            target=lambda: came.append(crowd.visit(("127.0.0.1", target.port), count, over))
        )
        visit.start()
        good = start_good_client(target, None)
        most, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            most = max(most, len(os.listdir(Path(f"/proc/{process.pid}/fd"))))
            time.sleep(0.05)
        found = json.loads(good.communicate(timeout=HANG)[0])
        process.terminate()
        said = process.communicate(timeout=HANG)[1]
        over.set()
        visit.join()
    finally:
        process.kill()
        process.communicate()
    faults += [f"{name}: {fault}" for fault in found["faults"]]
    results: dict[str, object] = found["results"]
    if found["results"]["longest wait, seconds"] > _LONGEST_S or not results["answers"]:
        faults.append(f"{name}: the good client waited too long: {results}")
    if most > files - min(_OWN_FILES, files // 8):
        faults.append(f"{name}: {most} of {files} files were open")
    if process.returncode != 143 or said:
        faults.append(f"{name}: the server ended with {process.returncode}, said {said[:300]!r}")
    return {**results, "connections in all": came[0], "most open files": most}


if __name__ == "__main__":
    sys.exit(main())
