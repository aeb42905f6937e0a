"""Kills, stops and cuts off workers at drawn moments: no answer shows it.

    python tests/campaigns/workers.py [--parts kills,hangs,links,chats,strangers] [--seed 0]
        [--model DIR]

A worker (`mixchat worker`) and a chat side are in network namespaces of their own, which needs
root. The chat side is a program that calls `load_engine` and `generate`, and tells when each token
and each layer of a prompt is done. It has memory for half of the experts. The model is the demo,
which is built unless --model names an installed one. Exit code 0: no fault was found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rig
import strangers
from worker_rig import PORT, ChatSide, Network, Worker, prompt

HALF = "50%"
DECODE = ("decode", prompt(1, 24), 40)  # a short prompt, and tokens of the answer
PREFILL = ("prefill", prompt(2, 1500), 3)
TARGETS = {"kills": 2.0, "hangs": 10.0, "links": 10.0}  # seconds until an answer goes on
FREE = 10.0  # seconds until a worker is free again
BLOCKED = 5.0  # seconds until a rightful chat side among strangers is served


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

    def worker(self) -> Worker:
        return Worker(self.network, self.key, self.model, self.work / "worker-output", HALF)

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


def faults(
    campaign: Campaign, name: str, count: int, strike: Callable[[Worker], Callable[[], None]]
) -> Found:
    """Let `strike` hit the worker in each answer; what it returns is done after the answer."""
    found, chance = Found(name), campaign.chance
    worker, chat = campaign.worker(), campaign.chat()
    lengths = {}
    for kind, ids, tokens in (DECODE, PREFILL):
        asked = time.monotonic()
        chat.ask(ids, tokens)
        lengths[kind] = chat.until_end()[-1][0] - asked
    for number in range(count):
        kind, ids, tokens = PREFILL if number % 3 == 2 else DECODE
        chat.ask(ids, tokens)
        time.sleep(chance.random() * lengths[kind] * 0.95)
        struck = time.monotonic()
        undo = strike(worker)
        events = chat.until_end()
        _, _, answer, notes, _ = events[-1]
        where = f"{name} {number} ({kind})"
        after = [event[0] for event in events if event[0] > struck and event[1] != "end"]
        if answer != campaign.answers[kind]:
            found.faults.append(f"{where}: another answer: {answer}")
        if len(notes) > 1:
            found.faults.append(f"{where}: {notes}")
        if after and notes:
            seconds = after[0] - struck
            found.seconds.setdefault(f"goes on in {kind}", []).append(seconds)
            found.outcomes[notes[0].split("(")[1].split(")")[0]] += 1
            if seconds > TARGETS[name]:
                found.faults.append(f"{where}: went on after {seconds:.1f} s")
        elif not notes:
            found.outcomes["the answer had ended, or did without the worker from there"] += 1
        undo()
        if not _lives(worker.pid):
            worker = campaign.worker()
        taken_up(chat, found)
    chat.end()
    worker.end()
    return found


def taken_up(chat: ChatSide, found: Found) -> None:
    """Ask until the worker takes part again."""
    began = time.monotonic()
    for turn in range(1, 200):
        chat.ask(DECODE[1][:3], 1)
        if chat.until_end()[-1][4]:
            found.outcomes[f"taken up in turn {turn}" if turn < 3 else "taken up later"] += 1
            found.seconds.setdefault("until it is taken up", []).append(time.monotonic() - began)
            return
        time.sleep(0.5)
    found.faults.append("a worker is not taken up again")


def kill(worker: Worker) -> Callable[[], None]:
    worker.end()
    return lambda: None


def stop(campaign: Campaign) -> Callable[[Worker], Callable[[], None]]:
    """Stop the worker; let it go on after the answer, or kill it."""

    def strike(worker: Worker) -> Callable[[], None]:
        worker.send(signal.SIGSTOP)
        if campaign.chance.random() < 0.5:
            return lambda: worker.send(signal.SIGCONT)
        return worker.end

    return strike


def cut(campaign: Campaign) -> Callable[[Worker], Callable[[], None]]:
    """Set the link down, at either end, until after the answer."""

    def strike(worker: Worker) -> Callable[[], None]:
        side = campaign.chance.randrange(2)
        campaign.network.set_link(side, "down")
        return lambda: campaign.network.set_link(side, "up")

    return strike


def chats(campaign: Campaign, kills: int, cuts: int) -> Found:
    """Kill chat sides, or cut them off: the worker is free for the next one."""
    found, worker = Found("chat sides that go"), campaign.worker()
    for number in range(kills + cuts):
        chat = campaign.chat()
        kind, ids, tokens = (DECODE, PREFILL)[number % 2]
        chat.ask(ids, tokens)
        chat.next_event()
        time.sleep(campaign.chance.random() * 0.5)
        went = time.monotonic()
        what = "killed" if number < kills else "cut off"
        if number < kills:
            os.kill(chat.pid, signal.SIGKILL)
        else:
            campaign.network.set_link(1, "down")
        worker.wait_for("the chat ends", number + 1)
        seconds = time.monotonic() - went
        found.seconds.setdefault(f"the worker is free: {what} in {kind}", []).append(seconds)
        if seconds > FREE:
            found.faults.append(f"chat {number}: the worker was free after {seconds:.1f} s")
        chat.end()
        campaign.network.set_link(1, "up")
    chat = campaign.chat()
    chat.ask(DECODE[1], DECODE[2])
    if chat.until_end()[-1][2] != campaign.answers["decode"]:
        found.faults.append("another answer")
    chat.end()
    worker.end()
    return found


def among_strangers(campaign: Campaign, count: int) -> Found:
    """Let strangers come, and meanwhile chat sides that have the key, one after the other."""
    found, worker = Found("strangers"), campaign.worker()
    target, seed = (campaign.network.hosts[0], PORT), campaign.chance.randrange(1 << 30)
    report = campaign.work / "strangers"

    def come() -> None:
        report.write_text(json.dumps(strangers.visit(target, count, seed)))

    rightful(campaign, found)
    worker.wait_for("the chat ends")
    before = worker.use()
    process = rig.fork(campaign.network.inside(1, come))
    while not report.exists() or not report.read_text():
        rightful(campaign, found)
    rig.wait(process)
    outcomes, longest = json.loads(report.read_text())
    found.outcomes.update(outcomes)
    found.seconds["a stranger is kept at most"] = [longest]
    found.faults += [kind for kind in outcomes if ":" in kind]
    found.faults += [
        f"a rightful chat waited {seconds:.1f} s"
        for seconds in found.seconds["a rightful chat side is loaded"]
        if seconds > BLOCKED
    ]
    worker.wait_for("the chat ends", len(found.seconds["a rightful chat side is loaded"]))
    memory, *rest = (after - once for after, once in zip(worker.use(), before, strict=True))
    found.outcomes["MB more than before"] = memory
    if any(number > 0 for number in rest):
        found.faults.append(f"threads and files that are left: {rest}")
    worker.end()
    return found


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


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def main() -> int:
    """Run the campaign and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="kills,hangs,links,chats,strangers")
    parser.add_argument(
        "--rounds", type=int, help="of each part; by default 100, 50, 50, 30 and 200"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    results = []
    with rig.workplace() as work:
        rig.warm_up()
        warm_up()
        model = work / "model"
        model.symlink_to(options.model.resolve() if options.model else demo())
        network = Network()
        try:
            campaign = Campaign(work, model, network, random.Random(options.seed))
            for part in options.parts.split(","):
                began = time.monotonic()
                results.append(run_part(campaign, part, options.rounds))
                results[-1].report(began)
        finally:
            network.close()
    return 1 if any(found.faults for found in results) else 0


def run_part(campaign: Campaign, part: str, rounds: int | None) -> Found:
    """Run a part of the campaign."""
    if part == "strangers":
        return among_strangers(campaign, rounds or 200)
    if part == "chats":
        return chats(campaign, rounds or 20, rounds or 10)
    strikes: dict[str, tuple[int, Any]] = {
        "kills": (100, kill),
        "hangs": (50, stop(campaign)),
        "links": (50, cut(campaign)),
    }
    count, strike = strikes[part]
    return faults(campaign, part, rounds or count, strike)


def warm_up() -> None:
    """Import what workers and chat sides need."""
    import mixchat.cli.worker
    import mixchat.experts.workers.server
    import mixchat.loading.loader
    import mixchat.loading.served_experts  # noqa: F401


def demo() -> Path:
    """Build the demo model."""
    from mixchat.cli.opening import find_or_build

    return find_or_build("demo")


if __name__ == "__main__":
    sys.exit(main())
