"""Kills, stops, cuts off and interrupts workers at drawn moments: no answer shows it.

    python tests/campaigns/workers.py [--parts kills,hangs,links,chats,strangers,descriptors,
        crowd,ctrl-c-worker,ctrl-c-run,ctrl-c-chat] [--seed 0] [--model DIR]

A worker (`mixchat worker`) and a chat side are in network namespaces of their own, which needs
root. The chat side is a program that calls `load_engine` and `generate`, and tells when each token
and each layer of a prompt is done. It has memory for half of the experts. The model is the demo,
which is built unless --model names an installed one. Those of Ctrl-C are `mixchat
run` itself. Exit code 0: no fault was found.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rig
import strangers
from chat_interrupts import interrupted_chats, interrupted_runs
from worker_campaign import DECODE, FREE, PREFILL, Campaign, Found, rightful, taken_up
from worker_interrupts import interrupted_workers
from worker_rig import PORT, Network, Worker

CTRL_C = {
    "ctrl-c-worker": interrupted_workers,
    "ctrl-c-run": interrupted_runs,
    "ctrl-c-chat": interrupted_chats,
}
PARTS = ",".join(["kills,hangs,links,chats,strangers,descriptors,crowd", *CTRL_C])
_FILES, _CROWD = 1024, 1300  # that a worker may open, and strangers at once
TARGETS = {"kills": 2.0, "hangs": 10.0, "links": 10.0}  # seconds until an answer goes on
BLOCKED = 5.0  # seconds until a rightful chat side among strangers is served


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


def without_descriptors(campaign: Campaign, count: int) -> Found:
    """Let a crowd take all descriptors of a worker in the midst of chats: no answer shows it."""
    found, worker, chat = Found("no descriptors"), campaign.worker(), campaign.chat()
    target = (campaign.network.hosts[0], PORT)
    _, _, files = worker.use()
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (files + 30, files + 30))
    came = rig.fork(campaign.network.inside(1, lambda: strangers.crowd(target, 200, count)))
    end = time.monotonic() + count
    while time.monotonic() < end:
        for kind, ids, tokens in (DECODE, PREFILL):
            chat.ask(ids, tokens)
            *_, (_, _, answer, notes, on_worker) = chat.until_end()
            if answer != campaign.answers[kind]:
                found.faults.append(f"{kind}: another answer: {answer}")
            found.outcomes["answers with the worker" if on_worker else "answers alone"] += 1
            found.outcomes.update(note.split("(")[1].split(")")[0] for note in notes)
            found.outcomes["looks at which it has no descriptor left"] += (
                worker.use()[2] >= files + 30
            )
    rig.wait(came)
    if not _lives(worker.pid):
        found.faults.append("the worker has ended")
    taken_up(chat, found)
    chat.end()
    worker.end()
    return found


def in_a_crowd(campaign: Campaign, count: int) -> Found:
    """Let 1,300 strangers come again and again to a worker that may open 1,024 files.

    A chat that was there before goes on, and others with the key get in.
    """
    found, worker, chat = Found("a crowd"), campaign.worker(_FILES), campaign.chat()
    target, over = (campaign.network.hosts[0], PORT), time.monotonic() + count

    def come() -> None:
        ended = threading.Event()
        threading.Timer(count, ended.set).start()
        strangers.Crowd().visit(target, _CROWD, ended)

    came = rig.fork(campaign.network.inside(1, come))
    while time.monotonic() < over - count / 2:
        kind, ids, tokens = DECODE
        chat.ask(ids, tokens)
        *_, (_, _, answer, notes, on_worker) = chat.until_end()
        if answer != campaign.answers[kind]:
            found.faults.append(f"{kind}: another answer: {answer}")
        found.outcomes["answers with the worker" if on_worker else "answers alone"] += 1
        found.outcomes.update(note.split("(")[1].split(")")[0] for note in notes)
        if worker.use()[2] >= _FILES:
            found.faults.append("the worker has no descriptor for itself")
    chat.end()
    worker.wait_for("the chat ends")
    while time.monotonic() < over:
        rightful(campaign, found)
    rig.wait(came)
    if not _lives(worker.pid):
        found.faults.append("the worker has ended")
    worker.end()
    return found


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def main() -> int:
    """Run the campaign and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument(
        "--rounds",
        type=int,
        help="of each part; by default 100, 50, 50, 30, 10000, 20 and 60 (seconds) and 50 each",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    results = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
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
        return among_strangers(campaign, rounds or 10_000)
    if part == "descriptors":
        return without_descriptors(campaign, rounds or 20)
    if part == "crowd":
        return in_a_crowd(campaign, rounds or 60)
    if part == "chats":
        return chats(campaign, rounds or 20, rounds or 10)
    if part in CTRL_C:
        return CTRL_C[part](campaign, rounds or 50)
    strikes: dict[str, tuple[int, Any]] = {
        "kills": (100, kill),
        "hangs": (50, stop(campaign)),
        "links": (50, cut(campaign)),
    }
    count, strike = strikes[part]
    return faults(campaign, part, rounds or count, strike)


def warm_up() -> None:
    """Import what workers and chat sides need."""
    import mixchat.cli.serve
    import mixchat.experts.workers.server
    import mixchat.loading.loader
    import mixchat.loading.served_experts  # noqa: F401


def demo() -> Path:
    """Build the demo model."""
    from mixchat.cli.output.progress import TerminalReporter
    from mixchat.face.load import find_or_build

    return find_or_build("demo", TerminalReporter())


if __name__ == "__main__":
    sys.exit(main())
