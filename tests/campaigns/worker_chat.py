"""`mixchat run --worker` in a terminal: an answer to one question, or a chat."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import rig
from worker_campaign import HALF, Campaign
from worker_rig import PATIENCE, PORT, Worker

sys.path.insert(0, str(rig.HERE.parent / "cli"))
from terminal import Terminal

PROMPT, ENTER, CTRL_C = ">>>", "\r", "\x03"
LOADING, LOADED = "loading ", "\x1b[?25h"  # a bar without a cursor, and the cursor again
ACCEPTED = "\x1b[?2004l"  # what the prompt sends when a line was entered
QUESTION = "What is the capital of France?"
STORY = "Tell me a very long story about the sea."
LONG_TEXT = 1100  # words: about as many tokens or more, which leave room for an answer
_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|reading [\d,]+ of [\d,]+ tokens \(\d+%\)|\s")


def _start(campaign: Campaign, with_worker: bool, *arguments: str) -> Terminal:
    options = ["-m", campaign.model, "--host-memory", HALF, "--ctx-size", "2048", "--temp", "0"]
    # An answer must not depend on how much of its prompt an interrupted one has left in the cache.
    options.append("--exact-prompts")
    if with_worker:
        worker = f"{campaign.network.hosts[0]}:{PORT}"
        options += ["--worker", worker, "--key-file", campaign.key]
    command = campaign.network.command(1, "run", *map(str, options), *arguments)
    return Terminal(command, dict(os.environ))


def _long_file(campaign: Campaign, number: int) -> Path:
    """Write a text that begins otherwise than all before, so that none of it is known already."""
    path = campaign.work / f"long-{number}.txt"
    path.write_text(f"{number} " + "sea ship sun wind " * (LONG_TEXT // 4))
    return path


def _wait_until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


class Run:
    """One answer to one question."""

    def __init__(self, campaign: Campaign, worker: Worker, long: bool) -> None:
        self._worker, self._before = worker, worker.count("a chat begins")
        self._began = time.monotonic()
        files = ["-f", str(_long_file(campaign, 0))] if long else []
        self._terminal = _start(campaign, True, "-n", "40", *files, STORY)

    def lengths(self) -> dict[str, tuple[float, float]]:
        """Return from when to when it starts, loads, processes the prompt and decodes."""
        times = [0.0]
        for wait in (self.wait_for_load, self._wait_until_loaded, self.wait_for_text, self._wait):
            wait()
            times.append(time.monotonic() - self._began)
        moments = ("start", "loading", "prefill", "decode")
        return dict(zip(moments, pairwise(times), strict=True))

    def wait_for_load(self) -> None:
        """Wait until it begins to load, which begins with connecting."""
        _wait_until(lambda: LOADING in self._terminal.look())

    def wait_for_text(self) -> None:
        """Wait for the first text of the answer."""
        _wait_until(self._text)

    def phase(self) -> str:
        """Return what it does now, as far as it shows."""
        if self._text():
            return "decode"
        if LOADED in self._terminal.look():
            return "prefill"
        if LOADING not in self._terminal.look():
            return "starting"
        has_chat = self._worker.count("a chat begins") > self._before
        return "loading" if has_chat else "connecting"

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit code."""
        with self._terminal:
            self._terminal.type(CTRL_C)
            return int(self._terminal.wait_for_end(PATIENCE))

    def gave_up(self) -> bool:
        """Return whether it ended because the worker did not answer."""
        return "does not answer" in self._terminal.screen.decode(errors="replace")

    def _wait_until_loaded(self) -> None:
        _wait_until(lambda: LOADED in self._terminal.look())

    def _wait(self) -> None:
        assert self._terminal.wait_for_end(PATIENCE) == 0

    def _text(self) -> str:
        return _SEQUENCES.sub("", self._terminal.look().partition(LOADED)[2])


class Chat:
    """A chat with one prompt after the other."""

    def __init__(self, campaign: Campaign, with_worker: bool = True) -> None:
        self._campaign, self._numbers = campaign, count(1)
        self._interrupted_at = 0
        self._shown = ""  # with the last answer
        self._terminal = _start(campaign, with_worker, "-n", "40", "--verbose")

    def __enter__(self) -> Chat:
        self._terminal.wait_for(PROMPT, PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        self._terminal.__exit__(*error)

    def type_line(self, line: str) -> None:
        """Enter a line, and wait until it was taken."""
        self._terminal.look()
        self._terminal._seen = len(self._terminal.screen)
        self._terminal.type(line + ENTER)
        self._terminal.wait_for(ACCEPTED, PATIENCE)

    def command(self, line: str) -> None:
        """Enter a command, and wait for the next prompt."""
        self.type_line(line)
        self._terminal.wait_for(PROMPT, PATIENCE)

    def ask(self, long: bool) -> None:
        """Begin an answer, to a long prompt or to a short one."""
        if long:
            self.command(f"/read {_long_file(self._campaign, next(self._numbers))}")
        self.type_line(STORY)

    def lengths(self, long: bool) -> tuple[float, float]:
        """Return the seconds until the first text and the end, where the like was asked before."""
        for _ in range(2):
            self.ask(long)
            began = time.monotonic()
            _wait_until(self.has_text)
            first = time.monotonic() - began
            self._terminal.wait_for(PROMPT, PATIENCE)
            whole = time.monotonic() - began
            self.command("/clear")
        return first, whole

    def has_text(self) -> bool:
        """Return whether some text of the answer is there."""
        self._terminal.look()
        since = self._terminal.screen[self._terminal._seen :].decode(errors="replace")
        return bool(_SEQUENCES.sub("", since))

    def interrupt(self) -> float | None:
        """Press Ctrl-C; return the seconds until the prompt is back, None if no answer stopped."""
        self._interrupted_at = len(self._terminal.look())
        pressed = time.monotonic()
        self._terminal.type(CTRL_C)
        shown = self._terminal.wait_for(PROMPT, PATIENCE)
        if "(stopped" in shown:
            return time.monotonic() - pressed
        time.sleep(0.5)  # it came to a prompt, and there is another one by then
        return None

    def answer(self, question: str) -> str:
        """Return the answer to a question, as it was saved."""
        self.type_line(question)
        self._shown = self._terminal.wait_for(PROMPT, PATIENCE)
        from mixchat.chat.saved.chat_store import ChatStore

        store = ChatStore(self._campaign.work / "home" / "chats")
        return store.load("last").messages[-1].content

    def on_workers(self) -> bool:
        """Return whether workers held experts in the last answer."""
        return re.search(r"[1-9]\d* worker slot", self._shown) is not None

    def since_interrupt(self) -> str:
        """Return what came since Ctrl-C."""
        return self._terminal.look()[self._interrupted_at :]
