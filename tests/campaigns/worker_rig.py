"""Tools for the campaign on workers: namespaces, workers, and a chat side that tells of tokens."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rig

PORT = 7917
PATIENCE = 90.0  # seconds, after which a process counts as hung
_NEWNET = 0x40000000


class Network:
    """Two namespaces with a link between them, one for the worker and one for the chat side."""

    def __init__(self) -> None:
        self.sides = [f"mixchat-{side}-{os.getpid()}" for side in ("worker", "chat")]
        self.hosts = ["10.83.0.1", "10.83.0.2"]
        names = [f"mxw{os.getpid()}", f"mxc{os.getpid()}"]
        self._names = names
        for side in self.sides:
            _ip("netns", "add", side)
        _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for side, name, host in zip(self.sides, names, self.hosts, strict=True):
            _ip("link", "set", name, "netns", side)
            _ip("-n", side, "address", "add", f"{host}/24", "dev", name)
            _ip("-n", side, "link", "set", "lo", "up")
            _ip("-n", side, "link", "set", name, "up")

    def set_link(self, side: int, state: str) -> None:
        """Set the link `up` or `down`, at the worker's (0) or the chat's side (1)."""
        _ip("-n", self.sides[side], "link", "set", self._names[side], state)

    def inside(self, side: int, work: Callable[[], object]) -> Callable[[], object]:
        """Return work that is done in the namespace of a side."""

        def moved() -> object:
            with open(f"/run/netns/{self.sides[side]}") as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(namespace.fileno(), _NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return work()

        return moved

    def command(self, side: int, *arguments: str) -> list[str]:
        """Return the command line that runs `mixchat` in the namespace of a side."""
        enter = ["ip", "netns", "exec", self.sides[side]]
        return [*enter, sys.executable, "-m", "mixchat", *arguments]

    def close(self) -> None:
        """Remove the namespaces, and the link with them."""
        for side in self.sides:
            _ip("netns", "delete", side)


class Worker:
    """`mixchat worker` in a forked process, which may open so many `files`."""

    def __init__(
        self,
        network: Network,
        key: Path,
        model: Path,
        output: Path,
        memory: str,
        files: int | None = None,
    ) -> None:
        self.output = output
        output.write_text("")
        command = rig.mixchat(*worker_arguments(network, key, model, memory))

        def limited() -> object:
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
            return command()

        self.pid = rig.fork(network.inside(0, limited), output)
        self.wait_for("ready for a chat")

    def wait_for(self, part: str, count: int = 1) -> None:
        """Wait until it has printed this so many times."""
        end = time.monotonic() + PATIENCE
        while self.count(part) < count:
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.01)

    def count(self, part: str) -> int:
        """Return how often it has printed this."""
        return self.output.read_text().count(part)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it lives."""
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def use(self) -> tuple[int, int, int]:
        """Return its memory in MB, its threads and its open files."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return int(fields["VmRSS"].split()[0]) // 1000, int(fields["Threads"]), files


def worker_arguments(network: Network, key: Path, model: Path, memory: str) -> list[str]:
    """Return the command line of a worker."""
    address = f"{network.hosts[0]}:{PORT}"
    options = ["-m", str(model), "--key-file", str(key), "--host-memory", memory]
    return ["worker", *options, "--listen", address]


class ChatSide:
    """A forked process with an engine, which tells when each layer of a prompt or token is done."""

    def __init__(
        self, network: Network, key: Path, model: Path, memory: str, workers: int = 1
    ) -> None:
        orders, self._orders = os.pipe()
        self._events, events = os.pipe()
        addresses = (f"{network.hosts[0]}:{PORT}",) * workers

        def work() -> None:
            os.close(self._orders)
            os.close(self._events)
            _chat(orders, events, model, key, memory, addresses)

        self.pid = rig.fork(network.inside(1, work), model.parent / "chat-output")
        os.close(orders)
        os.close(events)
        self._rest = b""
        self.next_event()  # it has loaded

    def ask(self, prompt: list[int], tokens: int) -> None:
        """Begin an answer; its events follow, the last one is `end`."""
        os.write(self._orders, json.dumps([prompt, tokens]).encode() + b"\n")

    def next_event(self, patience: float = PATIENCE) -> list[Any]:
        """Return the next event: its time, its kind, and what it says."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._events], [], [], patience)
            assert ready, "the chat side hangs"
            data = os.read(self._events, 1 << 16)
            assert data, "the chat side has ended"
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return list(json.loads(line))

    def until_end(self) -> list[list[Any]]:
        """Return all events up to the end of the answer."""
        events = [self.next_event()]
        while events[-1][1] != "end":
            events.append(self.next_event())
        return events

    def end(self) -> None:
        """Kill it, if it lives."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        for descriptor in (self._orders, self._events):
            with suppress(OSError):
                os.close(descriptor)


def prompt(seed: int, tokens: int) -> list[int]:
    """Return token ids of a prompt."""
    chance = random.Random(seed)
    return [chance.randrange(1000, 40000) for _ in range(tokens)]


def _chat(
    orders: int, events: int, model: Path, key: Path, memory: str, addresses: tuple[str, ...]
) -> None:
    from mixchat.base import interrupts
    from mixchat.base.options import LoadOptions, SamplingOptions
    from mixchat.base.quantities import MemoryBudget
    from mixchat.loading.loader import load_engine

    interrupts.install()
    notes: list[str] = []

    def tell(kind: str, *what: Any) -> None:
        os.write(events, json.dumps([time.monotonic(), kind, *what]).encode() + b"\n")

    options = LoadOptions(
        MemoryBudget.parse(memory), device="cpu", context_size=2048, workers=addresses, key_file=key
    )
    engine = load_engine(model, options, notes.append)
    tell("loaded")
    for line in os.fdopen(orders):
        ids, tokens = json.loads(line)
        engine.forget()
        notes.clear()
        answer = []
        told: list[int] = []

        def layer_done(done: int, total: int, told: list[int] = told) -> None:
            if not told:  # who is there is known when the turn has begun
                tell("begun", engine.slots_by_tier.get("worker", 0))
            told.append(done)
            tell("layer", done)

        for token in engine.generate(
            ids,
            sampling=SamplingOptions(temperature=0),
            stop_ids=set(),
            max_tokens=tokens,
            on_prefill=layer_done,
        ):
            tell("token", token)
            answer.append(token)
        tell("end", answer, list(notes), engine.slots_by_tier.get("worker", 0))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
