"""A worker with experts that are easy to compute, in a thread or in a process of its own."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE_S

from mixchat.base import interrupts, machine
from mixchat.base.errors import MixchatError
from mixchat.base.files import read_bytes
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.link import Link
from mixchat.experts.workers.listener import Listener
from mixchat.experts.workers.messages import Hello
from mixchat.experts.workers.server import Server

KEY = bytes(range(32))
HELLO = Hello(model_identity="ab" * 32, model_name="tiny", dtype="bfloat16", hidden_size=64)
SILENCE = 1.0  # seconds, where a test waits for a worker that hangs


TOKEN = [(2, 1), (5, 1)]  # what a token needs of a layer: two experts, one row each


def row() -> torch.Tensor:
    return torch.randn(1, HELLO.hidden_size).bfloat16()


def ask(
    link: Link, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor
) -> torch.Tensor:
    link.start(layer, experts, x)
    return link.finish()


def assert_right(link: Link, layer: int = 2) -> None:
    """A token's row gets the outputs of both experts."""
    x = row()
    assert torch.equal(ask(link, layer, TOKEN, x), outputs(layer, TOKEN, x, True))


class NeverEnding:
    """As `on_compute`: computes until the worker notices that nobody waits for the result."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def __call__(self, check: Callable[[], None]) -> None:
        self.started.set()
        while True:
            check()
            time.sleep(0.01)


def outputs(
    layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor, shared_row: bool = False
) -> torch.Tensor:
    """Return what the double's experts compute: each multiplies by a number of its own."""
    inputs = [x] * len(experts) if shared_row else x.split([rows for _, rows in experts])
    return torch.cat(
        [part * (layer + 0.25 * expert) for (expert, _), part in zip(experts, inputs, strict=True)]
    )


class Doubles:
    """Experts of 4 layers with 8 each, of which a worker holds 6.

    `on_compute` is called in the midst of a request, between two experts.
    """

    identity, name, hidden_size = HELLO.model_identity, HELLO.model_name, HELLO.hidden_size
    num_layers, num_experts = 4, 8

    def __init__(self, slots: int = 6) -> None:
        self.slots = slots
        self.loaded: list[ExpertKey] = []
        self.missing: list[ExpertKey] = []
        self.has_loaded, self.has_followed = threading.Event(), threading.Event()
        self.on_compute: Callable[[Callable[[], None]], None] = lambda check: None

    def begin(self, hello: Hello) -> str:
        if hello.exact_prompts:
            raise MixchatError("exact prompts are beyond these experts")
        return "words"

    def follow_memory(self) -> None:
        self.has_followed.set()

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        self.loaded = [key for key in self.loaded if key in keys]
        self.missing = [key for key in keys if key not in self.loaded]

    def load_next(self) -> bool:
        if self.missing:
            self.loaded.append(self.missing.pop(0))
        self.has_loaded.set()
        return bool(self.missing)

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        check()
        self.on_compute(check)
        return outputs(layer, experts, x, shared_row)


def interrupt(argument: object) -> Any:
    """Raise what Ctrl-C raises; a thread gets no signal."""
    raise KeyboardInterrupt


class ThreadedWorker:
    """A server in a thread of this process."""

    def __init__(self, model: Any = None, at: str = "127.0.0.1:0") -> None:
        self.model: Any = Doubles() if model is None else model
        self.notes: list[str] = []
        self._noted = threading.Condition()
        listener = Listener(resolve(at, any_port=True), KEY, self._note)
        self.address = resolve(listener.address)
        self._over = False
        self._server = Server(listener, self.model, self._note)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def open(self, hello: Hello = HELLO, key: bytes = KEY, silence: float = SILENCE) -> Link:
        return Link(self.address, key, hello, silence)

    def wait_for_note(self, part: str, count: int = 1) -> str:
        """Return the line with this part, when so many lines have it."""

        def found() -> list[str]:
            return [line for line in self.notes if part in line][count - 1 :]

        with self._noted:
            lines = self._noted.wait_for(found, PATIENCE_S)
            assert lines, self.notes
            return lines[0]

    def stop(self) -> None:
        """End it; chats must have ended."""
        self._over = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _note(self, line: str) -> None:
        with self._noted:
            self.notes.append(line)
            self._noted.notify_all()

    def _run(self) -> None:
        with suppress(KeyboardInterrupt):
            self._server.serve(lambda: self._over)


class WorkerProcess:
    """A server in a process of its own; a request for `STUCK_LAYER` never ends there.

    It may open so many `files` at most.
    """

    def __init__(self, files: int | None = None) -> None:
        limit = [] if files is None else ["prlimit", f"--nofile={files}:{files}"]
        self._process = subprocess.Popen(
            [*limit, sys.executable, __file__], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        try:
            self.address = resolve(self.next_line())
        except MixchatError:  # a process that is left fails other tests, too
            self.end()
            raise

    def open(self, silence: float = SILENCE) -> Link:
        return Link(self.address, KEY, HELLO, silence)

    def next_line(self) -> str:
        """Return the next line that it prints: its address, its notes, `computing`, `clean`."""
        return self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Return its exit code."""
        return self._process.wait(PATIENCE_S)

    def end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


STUCK_LAYER = 3  # of a `WorkerProcess`: what it is asked for there never ends


class _StuckDoubles(Doubles):
    """Those of a process ask for the memory and read a file, as an installed model's do."""

    def begin(self, hello: Hello) -> str:
        read_bytes(Path(__file__))
        return super().begin(hello)

    def follow_memory(self) -> None:
        machine.free_memory()
        super().follow_memory()

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        if layer == STUCK_LAYER:
            print("computing", flush=True)
            while True:
                check()
                time.sleep(0.01)
        return super().compute(layer, experts, x, shared_row, check)


def main() -> None:
    """Serve at some port, which is printed."""
    torch.set_num_threads(1)
    interrupts._END_TIMEOUT_S = PATIENCE_S  # a busy machine takes longer to close a listener
    interrupts.install()

    def note(line: str) -> None:
        print(line, flush=True)

    listener = Listener(resolve("127.0.0.1:0", any_port=True), KEY, note)
    server = Server(listener, _StuckDoubles(), note)
    try:
        print(listener.address, flush=True)
        server.serve()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        print("clean", flush=True)


if __name__ == "__main__":
    main()
