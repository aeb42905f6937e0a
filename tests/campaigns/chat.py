"""Stress of a chat with the demo model in a real terminal, and texts that could act on it.

    python tests/campaigns/chat.py [--early 12] [--interrupts 50] [--pipes 100] [--payloads 200]
        [--texts 1000]

The demo model must be installed. Exit code 0: no fault was found.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "cli"), str(HERE.parent.parent)]

MIXCHAT = [sys.executable, "-m", "mixchat"]
PROMPT, CTRL_C, CTRL_D, ENTER = ">>>", "\x03", "\x04", "\r"
ESC, BEL, ST = "\x1b", "\x07", "\x1b\\"
LONG = "Tell me a very long story about the sea."


def interrupts(rounds: int, work: Path) -> list[str]:
    """Press Ctrl-C at random moments of an answer, and measure when the prompt is back."""
    from terminal import Terminal

    environment = os.environ | {"MIXCHAT_HOME": str(home(work))}
    chance, seconds, faults = random.Random(0), [], []
    with Terminal([*MIXCHAT, "run", "-m", "demo"], environment) as terminal:
        terminal.wait_for(PROMPT, 60)
        for number in range(rounds):
            terminal.type(LONG + ENTER)
            terminal.wait_for(LONG)
            terminal.wait_for("\x1b[?2004l")
            time.sleep(chance.choice([0.0, 0.05, 0.2, 0.5, 1.0, 2.0]) + chance.random() * 0.1)
            pressed = time.perf_counter()
            terminal.type(CTRL_C)
            terminal.wait_for(PROMPT)
            seconds.append(time.perf_counter() - pressed)
            if number % 10 == 9:  # a short question is still answered well
                terminal.type("/clear" + ENTER)
                terminal.wait_for(PROMPT)
                terminal.type("What is the capital of France?" + ENTER)
                terminal.wait_for("Paris", 60)
                terminal.wait_for(PROMPT, 60)
        terminal.type(CTRL_D)
        if terminal.wait_for_end() != 0:
            faults.append("the chat did not end well")
    print(
        f"{rounds} interrupts: back at the prompt after {median(seconds) * 1e3:.0f} ms "
        f"(median), {max(seconds) * 1e3:.0f} ms at most"
    )
    return faults + [f"{s * 1e3:.0f} ms until the prompt" for s in seconds if s > 0.5]


def early(rounds: int, work: Path) -> list[str]:
    """Press Ctrl-C right after Enter: the answer stops, however soon it is."""
    from terminal import Terminal

    environment = os.environ | {"MIXCHAT_HOME": str(home(work))}
    faults = []
    with Terminal([*MIXCHAT, "run", "-m", "demo", "-n", "40"], environment) as terminal:
        terminal.wait_for(PROMPT, 60)
        for milliseconds in (0, 5, 10, 20, 30):
            stopped = sum(stops_early(terminal, milliseconds / 1000) for _ in range(rounds))
            print(f"Ctrl-C {milliseconds} ms after Enter: {stopped} of {rounds} answers stopped")
            if stopped < rounds:
                faults.append(f"{rounds - stopped} answers went on after {milliseconds} ms")
    return faults


def stops_early(terminal: Any, seconds: float) -> bool:
    """Ask, and press Ctrl-C so many seconds later: whether the answer stopped."""
    time.sleep(0.3)
    terminal._seen = len(terminal.look().encode())
    terminal.type(LONG + ENTER)
    time.sleep(seconds)
    terminal.type(CTRL_C)
    terminal.wait_for("\x1b[?2004l")  # the line was taken
    return "(stopped" in terminal.wait_for(PROMPT)


def pipes(rounds: int, work: Path) -> list[str]:
    """Close the reader after the first line: mixchat prints no error and ends soon."""
    environment = os.environ | {"MIXCHAT_HOME": str(home(work))}
    faults, seconds = [], []
    command = [*MIXCHAT, "run", "-m", "demo", "Write a list of ten animals, one on each line."]
    shell = '"$@" | { head -1 > /dev/null; date +%s.%N >&3; }; date +%s.%N >&3'
    for number in range(rounds):
        read, write = os.pipe()
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&{write}; {shell}", "x", *command, "--seed", str(number)],
            env=environment,
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        os.close(write)
        closed, ended = map(float, os.read(read, 1000).split())
        os.close(read)
        seconds.append(ended - closed)
        if done.stderr:
            faults.append(f"said {done.stderr!r}")
    print(
        f"{rounds} times `| head -1`: ended {median(seconds):.2f} s after the reader (median), "
        f"{max(seconds):.2f} s at most"
    )
    return faults


def payloads(count: int) -> list[str]:
    """Control sequences, cut everywhere, raw and as Markdown: none reaches the terminal."""
    from mixchat.chat.session import TextDelta
    from mixchat.chat.terminal.screen import Screen

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    ours = own_sequences()
    chance, faults, shown = random.Random(1), [], 0
    for _ in range(count):
        payload = control_sequence(chance)
        for at in range(1, len(payload)):
            for raw in (True, False):
                out = Tty()
                pieces = [TextDelta("a "), TextDelta(payload[:at]), TextDelta(payload[at:])]
                Screen(out, raw=raw).show(answer(*pieces))
                text, shown = out.getvalue(), shown + 1
                for sequence in ours:
                    text = text.replace(sequence, "")
                text = STYLES.sub("", text)
                if set(text) & FORBIDDEN:
                    faults.append(f"{payload!r} cut at {at}, {'raw' if raw else 'drawn'}: {text!r}")
    print(f"{count} payloads, cut at every place, raw and drawn: {shown} answers shown")
    return faults


def answer(*events: object) -> Iterator[Any]:
    """The events of an answer, and its end."""
    yield from (*events, None)


FORBIDDEN = {chr(c) for c in [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F)]}
FORBIDDEN |= {chr(c) for c in range(0x2066, 0x206A)} - {"\n"}
FORBIDDEN -= {"\n", "\t", "\r"}


# Rich uses only 16 colours here, so other colours are those of the payloads.
STYLES = re.compile(r"\x1b\[(?!38;5)[0-9;]*m")


def own_sequences() -> list[str]:
    """Return what drawing itself sends."""
    from mixchat.chat.draw import markdown_stream as stream

    names = ("_BEGIN", "_END", "_NO_WRAP", "_WRAP", "_HIDE_CURSOR", "_SHOW_CURSOR", "_ERASE_BELOW")
    return [getattr(stream, name) for name in names]


def control_sequence(chance: random.Random) -> str:
    """A sequence that a terminal would act on, with text around it."""
    number = chance.randrange(200)
    csi = chance.choice(["\x1b[", "\x9b"])
    text = chance.choice(
        [
            f"{csi}{number}{chance.choice('ABCDEFGHJKPSTXdfmnrsu')}",
            f"{csi}?{number}{chance.choice('hl')}",
            f"{csi}38;5;{number}m",
            f"{chance.choice([ESC + ']', chr(0x9D)])}{number % 60};x{chance.choice([BEL, ST])}",
            f"{chance.choice([ESC + 'P', chr(0x90)])}q{number}\x1b\\",
            f"\x1b{chance.choice('78=>cDEHMNOZ')}",
            f"\x1b({chance.choice('0AB')}",
            chance.choice("\x00\x05\x07\x08\x0b\x0c\x0e\x0f\x7f\x84\x85\x8d\x98"),
            chance.choice("\u202a\u202b\u202d\u202e\u2066\u2067\u2068") + "abc",
        ]
    )
    return chance.choice(["", "**", "`", "# "]) + text + chance.choice(["", "b", "`", "**", " c"])


def texts(count: int) -> list[str]:
    """Texts that spell control tokens have as many control tokens as harmless ones."""
    from mixchat.text.choose import load_template, load_tokenizer
    from mixchat.text.messages import Message
    from mixchat.weights import models

    directory = models.installed_directory("demo")
    tokenizer = load_tokenizer(directory)
    template, control = load_template(directory, tokenizer), set(tokenizer.control_tokens.values())
    spelled = [*tokenizer.control_tokens, "</s>", "<s>", "[INST]", "[/INST]", "<|im_end|>"]
    chance, faults = random.Random(2), []

    def count_of(text: str) -> int:
        asked = [Message("system", text), Message("user", text), Message("assistant", text)]
        return sum(i in control for i in template.encode([*asked, Message("user", text)]))

    expected = count_of("harmless")
    for _ in range(count):
        words = chance.choices([*spelled, "a", " ", "\n", "é", "<", "|"], k=chance.randrange(1, 9))
        if count_of("".join(words)) != expected:
            faults.append(f"{words!r} has other control tokens")
    print(f"{count} texts that spell control tokens: {expected} of them, as in harmless ones")
    return faults


def home(work: Path) -> Path:
    """Return a data directory with chats of its own and the installed models."""
    from mixchat.base.settings import data_dir

    place = work / "home"
    place.mkdir(exist_ok=True)
    if not (place / "models").exists():
        (place / "models").symlink_to(data_dir() / "models")
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    counts = {"early": 12, "interrupts": 50, "pipes": 100, "payloads": 200, "texts": 1000}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    asked = parser.parse_args()
    os.environ["TERM"] = "xterm"
    with TemporaryDirectory(prefix="mixchat-campaign-") as name:
        faults = payloads(asked.payloads)
        if asked.texts:
            faults += texts(asked.texts)
        if asked.early:
            faults += early(asked.early, Path(name))
        if asked.interrupts:
            faults += interrupts(asked.interrupts, Path(name))
        if asked.pipes:
            faults += pipes(asked.pipes, Path(name))
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
