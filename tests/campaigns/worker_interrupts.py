"""Ctrl-C to workers at drawn moments, a part of workers.py: they end, and no answer shows it."""

import signal
import subprocess
import time

import rig
from worker_campaign import DECODE, HALF, PREFILL, Campaign, Found, ended, taken_up
from worker_rig import worker_arguments

STARTS = 1.5  # seconds, about: `mixchat worker` is ready
LOADS = 0.6  # seconds, about: a worker's new chat connects and loads experts
MOMENTS = ("starting", "idle", "loading", "decode", "prefill")


def interrupted_workers(campaign: Campaign, count: int) -> Found:
    """Interrupt workers that start, wait, load, and compute, beside one chat side."""
    return _Rounds(campaign).run(count)


class _Rounds:
    def __init__(self, campaign: Campaign) -> None:
        self._campaign, self._found = campaign, Found("Ctrl-C to workers")
        self._worker, self._chat = campaign.worker(), campaign.chat()
        self._where = "the first answers"

    def run(self, count: int) -> Found:
        lengths = {"loading": LOADS}
        for kind in ("decode", "prefill"):
            began = time.monotonic()
            self._ask(kind)
            self._answer(kind)
            lengths[kind] = time.monotonic() - began
        for number in range(count):
            moment = MOMENTS[number % len(MOMENTS)]
            self._where = f"worker {number} ({moment})"
            self._round(moment, lengths.get(moment))
        self._chat.end()
        self._worker.end()
        return self._found

    def _round(self, moment: str, length: float | None) -> None:
        if moment == "loading":  # it begins a chat where the one before it has ended
            self._end("idle")
            self._ask("decode")
            self._answer("decode")
            self._worker = self._campaign.worker()
        notes = self._idle_end() if length is None else self._end_in_answer(moment, length)
        few = 0 if moment == "loading" else 1  # it may not have been taken up by then
        if not few <= len(notes) <= 1:
            self._found.faults.append(f"{self._where}: {len(notes)} lines: {notes}")
        if moment == "starting":
            self._end_start()
        self._worker = self._campaign.worker()
        if taken_up(self._chat, self._found) != 1:
            self._found.faults.append(f"{self._where}: not taken up in the next turn")

    def _idle_end(self) -> list[str]:
        """End the worker between two answers; return the lines of the next one."""
        self._end("idle")
        self._ask("decode")
        return self._answer("decode")

    def _end_in_answer(self, moment: str, length: float) -> list[str]:
        """End the worker within an answer; return the lines of that and of the next one."""
        kind = "prefill" if moment == "prefill" else "decode"
        self._ask(kind)
        time.sleep(self._campaign.chance.random() * length * 0.95)
        self._end(moment)
        notes = self._answer(kind)
        self._ask("decode")
        return notes + self._answer("decode")

    def _ask(self, kind: str) -> None:
        _, ids, tokens = PREFILL if kind == "prefill" else DECODE
        self._chat.ask(ids, tokens)

    def _answer(self, kind: str) -> list[str]:
        """Wait for the end of an answer, which has to be right; return its lines."""
        _, _, answer, notes, _ = self._chat.until_end()[-1]
        if answer != self._campaign.answers[kind]:
            self._found.faults.append(f"{self._where}: another answer: {answer}")
        return list(notes)

    def _end(self, moment: str) -> None:
        struck = time.monotonic()
        self._worker.send(signal.SIGINT)
        code = rig.wait(self._worker.pid)
        ended(self._found, self._where, f"a worker ends: {moment}", code, struck)

    def _end_start(self) -> None:
        """Interrupt a worker that starts as a person starts it: with all imports."""
        campaign = self._campaign
        arguments = worker_arguments(campaign.network, campaign.key, campaign.model, HALF)
        with subprocess.Popen(
            campaign.network.command(0, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            time.sleep(0.1 + campaign.chance.random() * STARTS)
            struck = time.monotonic()
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate()
        if "Traceback" in output:
            self._found.faults.append(f"{self._where}: {output}")
        moment = "just ready" if "ready" in output else "starting"
        ended(self._found, self._where, f"a worker ends: {moment}", process.returncode, struck)
