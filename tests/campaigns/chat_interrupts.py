"""Ctrl-C to `mixchat run --worker` at drawn moments, two parts of workers.py.

It stops, its worker is free again, and the next answer is right, with the worker.
"""

import re
import signal
import time

from worker_campaign import FREE, Campaign, Found, ended, rightful
from worker_chat import QUESTION, Chat, Run
from worker_rig import PATIENCE, Worker

STOPS = 1.0  # seconds until an answer has stopped
HANGS = 1.9  # seconds that a chat waits for a worker that it connects to


def interrupted_runs(campaign: Campaign, count: int) -> Found:
    """Interrupt an answer to one question: while it starts, connects, loads, and answers."""
    found, worker = Found("Ctrl-C to one answer"), campaign.worker()
    lengths = Run(campaign, worker, long=False).lengths()
    lengths["prefill"] = Run(campaign, worker, long=True).lengths()["prefill"]
    for number in range(count):
        moment = ("start", "hang", "loading", "prefill", "decode")[number % 5]
        run = Run(campaign, worker, moment == "prefill")
        if moment == "hang":
            worker.send(signal.SIGSTOP)
        wait_in(run, moment, lengths, campaign.chance.random())
        phase = run.phase()
        struck = time.monotonic()
        code = run.interrupt()
        where = f"run {number} ({phase})"
        if code == 0 or (code == 1 and run.gave_up()):
            found.outcomes["it had ended already" if code == 0 else "it had given up already"] += 1
        else:
            ended(found, where, f"it ends: {phase}", code, struck)
        worker.send(signal.SIGCONT)
        free_again(campaign, worker, found, where)
    worker.end()
    return found


def wait_in(run: Run, moment: str, lengths: dict[str, tuple[float, float]], drawn: float) -> None:
    """Wait until a drawn time in a moment of an answer."""
    if moment == "hang":
        run.wait_for_load()
        time.sleep(drawn * HANGS)
        return
    if moment == "decode":
        run.wait_for_text()
    elif moment != "start":
        run.wait_for_load()
    began = lengths["loading" if moment == "prefill" else moment][0]
    begin, end = (at - began for at in lengths[moment])
    time.sleep(begin + 0.95 * drawn * (end - begin))


def free_again(campaign: Campaign, worker: Worker, found: Found, where: str) -> None:
    """Wait until the worker is free, and let it serve the next chat."""
    began = time.monotonic()
    while worker.count("a chat begins") > worker.count("the chat ends"):
        assert time.monotonic() < began + PATIENCE, worker.output.read_text()
        time.sleep(0.01)
    seconds = time.monotonic() - began
    found.seconds.setdefault("the worker is free after that", []).append(seconds)
    if seconds > FREE:
        found.faults.append(f"{where}: the worker was free after {seconds:.1f} s")
    rightful(campaign, found)


def interrupted_chats(campaign: Campaign, count: int) -> Found:
    """Interrupt answers of one chat, also where its worker hangs: the next answer is right."""
    found, worker = Found("Ctrl-C in a chat"), campaign.worker()
    with Chat(campaign, with_worker=False) as alone:
        expected = alone.answer(QUESTION)
    with Chat(campaign) as chat:
        (first, whole), (long_first, _) = chat.lengths(long=False), chat.lengths(long=True)
        lengths = {"decode": whole, "prefill": long_first}
        for number in range(count):
            moment = ("decode", "prefill", "hang", "connecting")[number % 4]
            where = f"chat {number} ({moment})"
            chat.command("/clear")
            if moment in ("hang", "connecting"):
                worker.send(signal.SIGSTOP)
            if moment == "connecting":  # its connection ends with the first answer
                chat.ask(long=False)
                time.sleep(0.3)
                stop(chat, found, where, "waiting for a worker that hangs")
            chat.ask(long=moment == "prefill")
            before = first if moment == "decode" else 0.0
            drawn = campaign.chance.random()
            time.sleep(before + 0.9 * drawn * (lengths.get(moment, HANGS) - before))
            stop(chat, found, where, moment)
            worker.send(signal.SIGCONT)
            next_answer(chat, found, where, expected)
    worker.end()
    return found


def stop(chat: Chat, found: Found, where: str, moment: str) -> None:
    """Press Ctrl-C in an answer: the prompt is back soon."""
    if moment in ("decode", "prefill"):
        moment = "decode" if chat.has_text() else "prefill"
    seconds = chat.interrupt()
    if seconds is None:
        found.outcomes[f"{moment}: it had ended already"] += 1
        return
    found.seconds.setdefault(f"the prompt is back: {moment}", []).append(seconds)
    if seconds > STOPS:
        found.faults.append(f"{where}: the prompt was back after {seconds:.1f} s")


def next_answer(chat: Chat, found: Found, where: str, expected: str) -> None:
    """Ask until the worker takes part; all answers have to be right."""
    began, turns = time.monotonic(), 0
    while turns == 0 or not chat.on_workers():
        if turns:
            time.sleep(0.5)
        turns += 1
        chat.command("/clear")
        answer = chat.answer(QUESTION)
        if answer != expected:
            found.faults.append(f"{where}: {answer!r} instead of {expected!r}")
    found.outcomes["taken up in turn 1" if turns == 1 else "taken up later"] += 1
    found.seconds.setdefault("until an answer with the worker", []).append(time.monotonic() - began)
    if turns > 1:
        lines = re.findall(r"worker [^\r\n]* is lost[^\r\n]*", chat.since_interrupt())
        found.faults.append(f"{where}: taken up in turn {turns}; lines: {lines}")
