"""Asks a real `mixchat serve` many things at once, with the `openai` package as the client.

    python tests/campaigns/served_answers.py MODEL [--at-once 40] [--requests 500] [--seed 0]

First each request is sent alone, to a server of its own. Then, to another one, all at once, of
which a third leave in the midst: no answer may differ from the one made alone, nor the beginning of
one that was left. Then come the other requests, and the server's memory after the first 50 and at
the end. Exit code 0: no fault was found.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

PATIENCE = 600.0  # seconds after which something hangs
_WORDS = Path(__file__).read_text().split()


@dataclass(frozen=True)
class Ask:
    """A request; `leaves_after` pieces the client goes away, if it is streamed."""

    fields: dict[str, Any]
    leaves_after: int | None = None

    def alone(self) -> Ask:
        """Return the request of a client that stays."""
        return Ask(self.fields)


def make(seed: int) -> Ask:
    """Return a random request. Some share their beginning, as conversations do."""
    choose = random.Random(seed)
    system = {"role": "system", "content": "You know this text: " + " ".join(_WORDS[:60])}
    question = " ".join(choose.choices(_WORDS, k=choose.randrange(1, 120)))
    messages = [system] * choose.randrange(2) + [{"role": "user", "content": question}]
    fields: dict[str, Any] = {
        "messages": messages,
        "seed": seed,
        "max_tokens": choose.randrange(1, 48),
        "temperature": choose.choice([0, 0.7, 1.0]),
        "stream": choose.random() < 0.6,
    }
    if choose.random() < 0.3:
        fields |= {"logprobs": True, "top_logprobs": choose.randrange(4)}
    if choose.random() < 0.2:
        fields |= {"frequency_penalty": 0.5, "presence_penalty": 0.3}
    if choose.random() < 0.2:
        fields |= {"stop": [".", " the"], "top_p": 0.9}
    return Ask(fields, choose.randrange(1, 12) if seed % 3 == 0 else None)


class Server:
    """`mixchat serve` in a process, and a client."""

    def __init__(self, model: str, parallel: int) -> None:
        command = [sys.executable, "-m", "mixchat", "serve", "-m", model, "--port", "0"]
        command += ["--parallel", str(parallel), "--queue", "1000"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.model, url = model, self._url()
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)

    def _url(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"http://\S+:\d+", line):
                return found[0]
        raise SystemExit("the server did not start")

    def ask(self, ask: Ask) -> str:
        """Return the text, and log probabilities where they were asked for."""
        create: Any = self._client.chat.completions.create
        if not ask.fields["stream"]:
            timeout = 0.3 if ask.leaves_after is not None else PATIENCE
            try:
                choice = create(model=self.model, **ask.fields, timeout=timeout).choices[0]
            except Exception:
                if ask.leaves_after is None:
                    raise
                return ""
            return choice.message.content + _numbers(choice.logprobs)
        text, numbers = "", ""
        with create(model=self.model, **ask.fields) as stream:
            for count, chunk in enumerate(stream):
                if count == ask.leaves_after:
                    return text
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    numbers += _numbers(choice.logprobs)
        return text + numbers

    def memory(self) -> int:
        """Return the bytes of memory that are the process's own."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])

    def end(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit code, and the seconds that it took."""
        start = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(30)
        return code, time.monotonic() - start


def _numbers(logprobs: Any) -> str:
    if logprobs is None:
        return ""
    return "".join(f" {each.token!r}={each.logprob:.9g}" for each in logprobs.content)


@contextmanager
def serving(model: str, parallel: int, faults: list[str]) -> Iterator[Server]:
    server = Server(model, parallel)
    try:
        yield server
    finally:
        code, seconds = server.end()
        print(f"SIGTERM: exit code {code} after {seconds:.1f} s", flush=True)
        if code != 128 + signal.SIGTERM or seconds > 10:
            faults.append(f"SIGTERM: exit code {code} after {seconds:.1f} s")


def compare(asks: Sequence[Ask], alone: Sequence[str], found: Sequence[str]) -> list[str]:
    """Return what differs."""
    faults = []
    for number, (ask, one, other) in enumerate(zip(asks, alone, found, strict=True)):
        same = one.startswith(other) if ask.leaves_after is not None else one == other
        if not same:
            faults.append(f"request {number}: {other!r:.200} and alone {one!r:.200}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--at-once", type=int, default=40, metavar="N")
    parser.add_argument("--requests", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    given = parser.parse_args()
    asks = [make(given.seed + n) for n in range(given.requests)]
    first, rest = asks[: given.at_once], asks[given.at_once :]
    faults: list[str] = []
    with serving(given.model, 1, faults) as server:
        alone = [server.ask(ask.alone()) for ask in first]
    with serving(given.model, 4, faults) as server, ThreadPoolExecutor(given.at_once) as clients:
        start = time.monotonic()
        faults += compare(first, alone, list(clients.map(server.ask, first)))
        left = sum(ask.leaves_after is not None for ask in first)
        print(f"{len(first)} at once in {time.monotonic() - start:.1f} s, {left} of them left")
        list(clients.map(server.ask, rest[: 50 - len(first)]))
        early = server.memory()
        list(clients.map(server.ask, rest[50 - len(first) :]))
        late = server.memory()
        print(f"memory after 50 requests {early / 1e6:.0f} MB, after {len(asks)} {late / 1e6:.0f}")
        if late > 1.15 * early:  # it swings by some 10%
            faults.append(f"memory grew from {early} to {late} bytes")
        faults += compare(first, alone, list(map(server.ask, first)))
    print(*faults or ["no fault"], sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "*")
    main()
