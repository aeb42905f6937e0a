"""Shared by the parts of the campaign on workers: what was found, and whom they let take part."""

import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import rig
from worker_rig import ChatSide, Network, Worker, prompt

HALF = "50%"
DECODE = ("decode", prompt(1, 24), 40)  # a short prompt, and tokens of the answer
PREFILL = ("prefill", prompt(2, 1500), 3)
FREE = 10.0  # seconds until a worker is free again
ENDS = 3.0  # seconds until a process that got Ctrl-C has ended
INTERRUPTED = 130


@dataclass
class Found:
    """The counts and times of one part."""

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def report(self, began: float) -> None:
        rows: dict[str, object] = dict(self.outcomes)
        for what, seconds in self.seconds.items():
            middle, most = statistics.median(seconds), max(seconds)
            rows[what] = f"{len(seconds)} times: median {middle:.2f} s, maximum {most:.2f} s"
        rig.table(f"{self.name}, {time.monotonic() - began:.0f} s", rows)
        for fault in self.faults[:20]:
            print(f"  FAULT: {fault}")
        sys.stdout.flush()


class Campaign:
    """Everything that the parts share."""

    def __init__(self, work: Path, model: Path, network: Network, chance: random.Random) -> None:
        self.work, self.model, self.network, self.chance = work, model, network, chance
        self.key = work / "worker.key"
        assert (
            rig.wait(rig.fork(rig.mixchat("worker", "--new-key", "--key-file", str(self.key)))) == 0
        )
        self.answers = self._references()

    def worker(self, files: int | None = None) -> Worker:
        output = self.work / "worker-output"
        return Worker(self.network, self.key, self.model, output, HALF, files)

    def chat(self, workers: int = 1) -> ChatSide:
        return ChatSide(self.network, self.key, self.model, HALF, workers)

    def _references(self) -> dict[str, list[int]]:
        chat = ChatSide(self.network, self.key, self.model, HALF, workers=0)
        answers = {}
        for name, ids, tokens in (DECODE, PREFILL):
            chat.ask(ids, tokens)
            answers[name] = chat.until_end()[-1][2]
        chat.end()
        return answers


def taken_up(chat: ChatSide, found: Found) -> int | None:
    """Ask until the worker takes part again; return in which turn it does."""
    began = time.monotonic()
    for turn in range(1, 200):
        chat.ask(DECODE[1][:3], 1)
        if chat.until_end()[-1][4]:
            found.outcomes[f"taken up in turn {turn}" if turn < 3 else "taken up later"] += 1
            found.seconds.setdefault("until it is taken up", []).append(time.monotonic() - began)
            return turn
        time.sleep(0.5)
    found.faults.append("a worker is not taken up again")
    return None


def rightful(campaign: Campaign, found: Found) -> None:
    """Let a chat side that has the key load and ask, and go."""
    began = time.monotonic()
    chat = campaign.chat()
    found.seconds.setdefault("a rightful chat side is loaded", []).append(time.monotonic() - began)
    chat.ask(DECODE[1], 4)
    *_, (_, _, answer, notes, on_worker) = chat.until_end()
    if answer != campaign.answers["decode"][:4] or notes or not on_worker:
        found.faults.append(f"a rightful chat: {answer} {notes}")
    chat.end()


def ended(found: Found, where: str, what: str, code: int | None, struck: float) -> None:
    """Note the end of a process that got Ctrl-C; a shell counts the system's own action as 130."""
    seconds = time.monotonic() - struck
    found.seconds.setdefault(what, []).append(seconds)
    if code not in (INTERRUPTED, -signal.SIGINT):
        found.faults.append(f"{where}: exit code {code}")
    if seconds > ENDS:
        found.faults.append(f"{where}: it ended after {seconds:.1f} s")
