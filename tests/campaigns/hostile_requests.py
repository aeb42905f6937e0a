"""Sends hundreds of hostile requests to a server, while a good client asks it all the time.

Each has to be answered with a 4xx (or be closed without an answer, where it is no request), none
with a 5xx; nothing may hang, the server may only name ignored fields, and the good client has to
get its answers. With `--model demo` the server has a real model, otherwise a scripted service.

    python tests/campaigns/hostile_requests.py [--rounds 1] [--model demo]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
from hostile_api_kinds import API_KINDS
from hostile_body_kinds import BODY_KINDS
from hostile_request_kinds import HANG, KINDS, Kind, Target
from rig import HERE, table, workplace

WEB = HERE.parent / "serving" / "web"
ALL = KINDS | API_KINDS | BODY_KINDS
IDLE = 1000
CLOSED = "closed"
# The scripted service has no vocabulary for which a form could be compiled.
NEED_A_MODEL = {
    "the same with tools and schemas",
    "hostile schemas",
    "schemas that take gigabytes",
    "the same, and clients that leave",
    "formats of Ollama",
    "formats that take gigabytes",
    "the same, and clients that go",
}
# No request may bring about a 5xx. 200 is that of one which is not as bad as it looks.
GOOD = {CLOSED, "200", "400", "403", "404", "405", "408", "413", "415", "429", "431"}


class Outcomes:
    """The count of each outcome for each kind of request."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    def attack(self, target: Target, name: str, kind: Kind, seed: int) -> None:
        """Send one request of a kind, and record what became of it."""
        try:
            response = kind(target, random.Random(seed))
            outcome = str(response.status)
            body = re.sub(rb"\A[0-9a-f]+\r\n", b"", response.body)  # the length of a chunk
            if not body.startswith((b"{", b"data", b":", b"event")):
                self.faults.append(f"{name}: a strange body: {response.body[:80]!r}")
        except ConnectionError:
            outcome = CLOSED
        except TimeoutError:
            outcome = "hangs"
        self.counts[name, outcome] += 1
        if outcome not in GOOD:
            self.faults.append(f"{name} (seed {seed}): {outcome}")

    def rows(self) -> dict[str, object]:
        """Return a row of a table for each kind."""
        return {
            name: ", ".join(
                f"{what}: {n}" for (kind, what), n in sorted(self.counts.items()) if kind == name
            )
            for name in ALL
        }


@contextlib.contextmanager
def server(model: str | None) -> Iterator[tuple[Target, subprocess.Popen[str]]]:
    """Start a server; yield it as soon as it serves."""
    real = [sys.executable, "-m", "mixchat", "serve", "-m", model or ""]
    command = [sys.executable, str(WEB / "fake_serve.py")] if model is None else real
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("http://"):
                yield Target(int(line.split("/")[2].rpartition(":")[2])), process
                break
    finally:
        process.kill()
        process.communicate()


class Memory:
    """Watches the memory of a server and its children."""

    def __init__(self, pid: int) -> None:
        self._process, self._peak, self._over = psutil.Process(pid), 0, threading.Event()
        self._before = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def results(self) -> dict[str, object]:
        """Return rows of a table."""
        self._over.set()
        ended = time.monotonic() + HANG
        while (busy := self._busy_children()) and time.monotonic() < ended:
            time.sleep(0.1)
        growth = (self._peak - self._before) / 1e9
        return {"memory that the server grew by, GB": round(growth, 2), "left behind": len(busy)}

    def _busy_children(self) -> list[psutil.Process]:
        """Return the children that compute: one with a GB, or that takes a core."""
        children = self._process.children()
        for child in children:
            child.cpu_percent()
        time.sleep(0.2)
        return [child for child in children if child.is_running() and child.cpu_percent() > 20]

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        size = 0
        for each in (self._process, *self._process.children()):
            with contextlib.suppress(psutil.Error):
                size += each.memory_info().rss
        return size


def start_good_client(target: Target, model: str | None) -> subprocess.Popen[str]:
    """Start a client; what the scripted service says is known."""
    expected = ["well"] if model is None else []
    return subprocess.Popen(
        [sys.executable, str(HERE / "good_client.py"), str(target.port), *expected],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=float, default=1, help="how often all kinds are sent")
    parser.add_argument("--model", help="an installed model; a scripted service without one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = [
        (name, kind, options.seed + number)
        for name, (kind, times) in ALL.items()
        if options.model or name not in NEED_A_MODEL
        for number in range(max(1, round(times * options.rounds)))
    ]
    random.Random(options.seed).shuffle(work)
    outcomes = Outcomes()
    place = contextlib.nullcontext() if options.model else workplace()
    with place, server(options.model) as (target, process):
        good = start_good_client(target, options.model)
        memory = Memory(process.pid)
        idle = [target.connect() for _ in range(IDLE)]
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda each: outcomes.attack(target, *each), work))
        found = json.loads(good.communicate(timeout=HANG)[0])
        for connection in idle:
            connection.close()
        found["results"] |= memory.results()
        process.terminate()
        said = process.communicate(timeout=HANG)[1]
    faults = outcomes.faults + found["faults"]
    said = re.sub(r"note: requests have the field \S+, which has no effect here\n", "", said)
    if process.returncode != 143 or said or not found["results"]["answers"]:
        faults.append(f"the server: exit {process.returncode}, said {said!r}")
    table(f"{len(work)} hostile requests beside {IDLE} idle connections", outcomes.rows())
    table("the good client", found["results"])
    table(f"{len(faults)} faults", dict(enumerate(faults[:40])))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
