"""Workers that serve an installed model, in processes that fault where they are told to.

Each process would take seconds to import torch. So one process imports it, and forks them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE_S

from mixchat.base import interrupts
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.listener import Listener
from mixchat.experts.workers.messages import Hello
from mixchat.experts.workers.server import Server
from mixchat.loading.served_experts import ServedExperts, load_served_experts
from mixchat.weights.format.installed_model import InstalledModel

KEY = bytes(range(32))


@dataclass(frozen=True)
class Fault:
    """A signal that a worker sends itself while it computes a request.

    layer: of the request; many: whether it is one of prefill; count: how many such requests it
    answers before.
    """

    signal: int
    layer: int
    many: bool
    count: int = 0


def open_served(directory: Path, slots: int) -> ServedExperts:
    """Return the experts of a model for a worker on a CPU that can hold so many."""
    with InstalledModel(directory) as model:
        budget = MemoryBudget(size=slots * model.blueprint.expert.stride)
    return load_served_experts(directory, LoadOptions(budget, device="cpu"), lambda line: None)


def hello_of(served: ServedExperts, dtype: str, exact: bool = False) -> Hello:
    """Return the first message of a chat with the worker's model."""
    return Hello(
        model_identity=served.identity,
        model_name=served.name,
        dtype=dtype,
        hidden_size=served.hidden_size,
        exact_prompts=exact,
    )


class Nursery:
    """The process that forks workers. `end` kills them all."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._workers: list[int] = []

    def start(
        self, directory: Path, slots: int, fault: Fault | None = None, at: str = "127.0.0.1:0"
    ) -> ForkedWorker:
        """Return a worker that serves the model, until its fault."""
        assert self._process.stdin is not None
        order = [str(directory), slots, asdict(fault) if fault else None, at]
        print(json.dumps(order), file=self._process.stdin, flush=True)
        pid, address = json.loads(self._process.stdout.readline())
        self._workers.append(pid)
        return ForkedWorker(pid, address)

    def end_workers(self) -> None:
        """Kill the workers that are left."""
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._workers.clear()

    def end(self) -> None:
        """End the process and its workers."""
        self.end_workers()
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


@dataclass(frozen=True)
class ForkedWorker:
    """A worker in a process of its own."""

    pid: int
    address: str

    def kill(self) -> None:
        """Kill it; its port is free afterwards."""
        os.kill(self.pid, signal.SIGKILL)
        while Path(f"/proc/{self.pid}").exists():
            pass


def _serve(directory: str, slots: int, fault: Fault | None, at: str) -> None:
    served: Any = open_served(Path(directory), slots)
    left, compute = [fault.count if fault else 0], served.compute

    def computed(layer: int, experts: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if fault and layer == fault.layer and (len(x) > 1) == fault.many:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), fault.signal)
        return compute(layer, experts, x, *rest)

    served.compute = computed
    listener = Listener(resolve(at, any_port=True), KEY, lambda line: None)
    print(json.dumps([os.getpid(), listener.address]), flush=True)
    Server(listener, served, lambda line: None).serve()


def main() -> None:
    """Fork a worker for each line: its model, slots, fault and address."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        directory, slots, fault, at = json.loads(line)
        if os.fork() == 0:
            interrupts.install()
            try:
                _serve(directory, slots, Fault(**fault) if fault else None, at)
            finally:
                os._exit(1)


if __name__ == "__main__":
    main()
