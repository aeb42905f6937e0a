"""SIGTERM, SIGHUP and SIGINT at random moments of a start, an answer and a chat of the demo.

    python tests/campaigns/signals.py [--starts 100] [--one 300] [--chats 100] [--at-once 1]

Each process has to end with 128 + n as a shell counts it, within a second, and say nothing; a chat
keeps what was said, and leaves the terminal as it was. The demo model has to be installed already.
Exit code 0: no fault was found.
"""

import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import rig
from chat import ENTER, LONG, MIXCHAT, PROMPT, home

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LATEST = 8.0  # seconds after the start
SOON = 1.0  # seconds
PATIENCE = 60  # seconds
START = 0.12  # seconds
OURS = f"{Path('mixchat', '__main__.py')}"  # in a traceback


@dataclass
class Found:
    """The ends of the processes."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, name: str, number: int, at: float, code: int, seconds: float, said: str) -> None:
        """A process that got a signal at `at`, and ended so many seconds later."""
        how = {-number: "by the signal", 128 + number: f"{code}"}.get(code, f"WRONG: {code}")
        self.codes[f"{name}, {signal.Signals(number).name}: {how}"] += 1
        self.seconds.append(seconds)
        where = f"{name}, {signal.Signals(number).name} at {at:.3f} s"
        if code not in (-number, 128 + number):
            self.faults.append(f"{where}: exit {code}, {said!r}")
        if seconds > SOON:
            self.faults.append(f"{where}: {seconds:.2f} s until it ended")
        if said:
            self.faults.append(f"{where}: said {said!r}")

    def tell(self, what: str) -> None:
        """Print what was found."""
        print(f"\n{what}: {len(self.seconds)} processes ended by a signal")
        for name, count in sorted(self.codes.items()):
            print(f"  {name:<50} {count}")
        if self.seconds:
            slow = sum(seconds > SOON for seconds in self.seconds)
            print(
                f"  ended after {median(self.seconds) * 1e3:.0f} ms (median), "
                f"{max(self.seconds):.2f} s at most, {slow} later than a second",
                flush=True,
            )


def one_shots(count: int, at_once: int, work: Path, seed: int) -> Found:
    """`mixchat run -m demo -n 1 hi`, ended at a random moment."""
    found, chance = Found(), random.Random(seed)
    environment = os.environ | {"MIXCHAT_HOME": str(home(work))}
    command = [*MIXCHAT, "run", "-m", "demo", "-n", "1", "hi"]
    began = time.monotonic()
    subprocess.run(command, env=environment, capture_output=True, check=True)
    whole = time.monotonic() - began
    print(f"left in peace, one answer takes {whole:.1f} s")
    moments = [(chance.choice(SIGNALS), chance.random() * min(whole, LATEST)) for _ in range(count)]

    def one(what: tuple[signal.Signals, float]) -> None:
        number, at = what
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(at)
            if process.poll() is not None:
                found.codes["one: had ended already"] += 1
                return
            process.send_signal(number)
            sent = time.monotonic()
            _, errors = process.communicate(timeout=PATIENCE)
        seconds = time.monotonic() - sent
        if process.returncode == 0 and seconds < 0.2:
            found.codes["one: was ending already"] += 1
            return
        if at < 0.1 and number == signal.SIGINT and "site" in errors:
            errors = ""  # Python's own, before the first line of ours
        found.add("one", number, at, process.returncode, seconds, errors)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, moments))
    return found


def starts(count: int, work: Path, seed: int) -> list[str]:
    """Ctrl-C while Python starts: a traceback may come from Python's own files, not from ours."""
    chance, ends, faults = random.Random(seed), Counter[str](), []
    environment = os.environ | {"MIXCHAT_HOME": str(home(work))}
    for _ in range(count):
        at = chance.random() * START
        with subprocess.Popen(
            [*MIXCHAT, "--version"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(at)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
        ours = "File" in errors.partition(OURS)[2]  # an import that it began
        ends["quiet" if not errors else "ours" if ours else "Python's own traceback"] += 1
        if ours:
            faults.append(f"Ctrl-C at {at:.3f} s: {errors!r}")
    print(f"\nCtrl-C within {START} s of the start: {dict(ends)}", flush=True)
    return faults


def chats(count: int, work: Path, seed: int) -> Found:
    """A chat, ended while it starts, waits, reads and answers."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cli"))
    from terminal import Terminal

    found, chance = Found(), random.Random(seed)
    for turn in range(count):
        number, at = chance.choice(SIGNALS[:2]), chance.random() * 4
        place = home_of_its_own(work, turn)
        environment = os.environ | {"MIXCHAT_HOME": str(place)}
        with Terminal([*MIXCHAT, "run", "-m", "demo"], environment) as terminal:
            before = termios.tcgetattr(terminal._master)[3]
            name = "chat, starting"
            if turn % 2:
                terminal.wait_for(PROMPT, PATIENCE)
                terminal.type(LONG + ENTER)
                name, at = "chat, answering", at / 2
            time.sleep(at)
            terminal.process.send_signal(number)
            sent = time.monotonic()
            code = terminal.wait_for_end(PATIENCE)
            seconds = time.monotonic() - sent
            screen = terminal.screen.decode()
            noise = "Traceback" in screen or "Exception" in screen or "error" in screen
            found.add(name, number, at, code, seconds, screen if noise else "")
            if termios.tcgetattr(terminal._master)[3] != before:
                found.faults.append(f"{name}, {number} at {at:.3f}: the terminal is not as it was")
            found.faults += [f"{name}, {number} at {at:.3f}: {f}" for f in lost(screen, place)]
    return found


def home_of_its_own(work: Path, turn: int) -> Path:
    """A place for one chat."""
    place = work / str(turn)
    place.mkdir()
    return home(place)


def lost(screen: str, place: Path) -> Iterator[str]:
    """Yield what was printed and is in no saved chat: the answer's first words."""
    _, _, said = screen.partition("\x1b[?2004l")
    said = re.sub(r"reading [\d,]+ (of|tokens)[^\r]*", "", said)  # up to its removal
    said = re.sub(r"\x1b\[2m.*?\x1b\[22m", "", said)  # the status line
    words = [word for word in said.split() if word.isalpha()]
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore(place / "chats")
    saved = [store.load(chat.id) for chat in store.all()]
    text = " ".join(message.content for chat in saved for message in chat.messages)
    if missing := [word for word in words[:5] if word not in text]:
        yield f"{missing} were printed and not saved"


def main() -> None:
    asked = rig.parsed(__doc__, starts=100, one=300, chats=100, at_once=1, seed=0)
    faults = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it
    with TemporaryDirectory(prefix="mixchat-campaign-") as name:
        if asked.starts:
            faults += starts(asked.starts, Path(name), asked.seed)
        if asked.one:
            found = one_shots(asked.one, asked.at_once, Path(name), asked.seed)
            found.tell("one answer")
            faults += found.faults
        if asked.chats:
            found = chats(asked.chats, Path(name), asked.seed)
            found.tell("chats")
            faults += found.faults
    sys.exit(rig.told(faults))


if __name__ == "__main__":
    main()
