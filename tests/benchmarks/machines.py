"""Runs `mixchat bench` and workers on machines that network namespaces and control groups make.

Each has one thread, an address of its own, and so much memory that its page cache holds no more
than a few experts beside those that it is to hold. All read the model from one data directory.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from network import Link, Network, ended, start

PORT = 7917
CHAT = "chat"
WORKERS = ("worker1", "worker2", "worker3")
MODEL = "synthetic"
# Bytes beside the experts: Python, torch, attention and head, and what `mixchat bench` measures
# the machine's limits with. The less, the less is left for the page cache.
CHAT_ROOM, WORKER_ROOM = 3_200_000_000, 1_500_000_000
GROUPS = Path("/sys/fs/cgroup")
LONGEST = 900  # seconds of a measurement


class Rig:
    """The machines: one that chats, and those of `WORKERS`."""

    def __init__(self, joined: Network, work: Path, stride: int) -> None:
        """Prepare them. stride: bytes of an expert; `work` is mixchat's home and gets the logs."""
        self._network, self._work, self._stride = joined, work, stride
        self._key = work / "worker.key"
        self._key.write_text(secrets.token_hex(32))
        self._key.chmod(0o600)
        self._environment = {**os.environ, "MIXCHAT_HOME": str(work), "OMP_NUM_THREADS": "1"}
        self._link: Link | None = None
        self._round_trip = 0.0

    def measure(
        self, bench: list[str], held: int, workers: int, shared: int, link: Link | None
    ) -> dict[str, Any]:
        """Return what `mixchat bench --json` found, the bytes that it read by second, and the link.

        bench: more of its options; held: experts that the chat side has memory for; shared: those
        that the workers together have memory for.
        """
        if link is not None and link != self._link:
            self._round_trip, self._link = self._network.set_link(link), link
        with ExitStack() as stack:
            for name in WORKERS[:workers]:
                stack.enter_context(self._worker(name, -(-shared // workers), workers))
                bench = [*bench, "--worker", f"{self._network.address(name)}:{PORT}"]
            if workers:
                bench = [*bench, "--key-file", str(self._key)]
            found, disk = self._bench(bench, held)
            split = self._split(held, workers) if workers else None
        round_trip = self._round_trip if workers else None
        return {"bench": found, "disk": disk, "round_trip": round_trip, "split": split}

    def _bench(self, options: list[str], held: int) -> tuple[dict[str, Any], list[int]]:
        size = str(held * self._stride)
        command = ["-m", "mixchat", "bench", MODEL, *options, "--host-memory", size]
        return self._chat([*command, "--json", "--rounds", "1"], held)

    def _split(self, held: int, workers: int) -> dict[str, float]:
        """Return where the time of a decoded layer goes: see `layer_split.py`."""
        script, model = Path(__file__).with_name("layer_split.py"), self._work / "models" / MODEL
        addresses = [f"{self._network.address(name)}:{PORT}" for name in WORKERS[:workers]]
        size = str(held * self._stride)
        split, _ = self._chat(
            [str(script), str(model), "24", size, str(self._key), *addresses], held
        )
        return split

    def _chat(self, command: list[str], held: int) -> tuple[dict[str, Any], list[int]]:
        """Return the JSON that Python prints on the machine that chats, and its reads by second."""
        limit = held * self._stride + CHAT_ROOM
        out, log = self._work / "bench.json", self._work / "bench.log"
        with out.open("w") as stdout, log.open("w") as stderr, memory_group(CHAT, limit) as group:
            started = self._start(CHAT, group, "0", command, stdout=stdout, stderr=stderr)
            with ended(started) as process:
                disk = read_by_second(process)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")
        return json.loads(out.read_text()), disk

    @contextmanager
    def _worker(self, name: str, held: int, of: int) -> Iterator[None]:
        """Run a worker that has room for so many experts, one `of` so many workers."""
        size, address = held * self._stride, self._network.address(name)
        command = ["-m", "mixchat", "worker", "-m", MODEL, "--listen", f"{address}:{PORT}"]
        command += ["--key-file", str(self._key), "--host-memory", str(size)]
        cores = "1" if of == 1 else f"0-{(os.cpu_count() or 1) - 1}"
        log = self._work / f"{name}.log"
        with log.open("w") as file, memory_group(name, size + WORKER_ROOM) as group:
            started = self._start(name, group, cores, command, stdout=file, stderr=file)
            with ended(started) as process:
                self._wait_for(address, process, log)
                yield

    def _wait_for(self, address: str, worker: subprocess.Popen[str], log: Path) -> None:
        """Wait until the worker listens."""
        connect = f"import socket; socket.create_connection(('{address}', {PORT}), 2)"
        command = self._network.inside(CHAT, [sys.executable, "-c", connect])
        while subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            if worker.poll() is not None:
                raise SystemExit(f"{' '.join(map(str, worker.args))}\n{log.read_text()}")
            time.sleep(0.2)

    def _start(
        self, name: str, group: Path, cores: str, command: list[str], **options: Any
    ) -> subprocess.Popen[str]:
        enter = ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(group)]
        python = [*enter, "taskset", "-c", cores, sys.executable, *command]
        return start(self._network.inside(name, python), env=self._environment, **options)


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[Path]:
    """Yield a control group whose processes may use `limit` bytes, page cache included."""
    first = GROUPS / "memory"  # of version 1, where each controller has a hierarchy of its own
    group = (first if first.is_dir() else GROUPS) / f"mixchat-{name}"
    group.mkdir(exist_ok=True)
    try:
        file = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
        (group / file).write_text(str(limit))
        yield group
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            os.kill(int(process), signal.SIGKILL)
        while (group / "cgroup.procs").read_text():
            time.sleep(0.01)
        group.rmdir()


def read_by_second(process: subprocess.Popen[str]) -> list[int]:
    """Wait for the process to end; return the bytes that it read from the disk in each second."""
    samples = [0]
    for _ in range(LONGEST):
        try:
            process.wait(1)
            return [after - before for before, after in pairwise(samples)]
        except subprocess.TimeoutExpired:
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            samples.append(int(dict(line.split(": ") for line in lines)["read_bytes"]))
    raise SystemExit(f"still running after {LONGEST} s: {process.args}")
