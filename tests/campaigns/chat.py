"""Stress of a chat with the demo model in a real terminal: Ctrl-C, and readers that go.

    python tests/campaigns/chat.py [--interrupts 50] [--pipes 100]

The demo model must be installed. Exit code 0: no fault was found.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import rig

sys.path.insert(0, str(rig.HERE.parent / "cli"))

MIXCHAT = [sys.executable, "-m", "mixchat"]
PROMPT, CTRL_C, CTRL_D, ENTER = ">>>", "\x03", "\x04", "\r"
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


def home(work: Path) -> Path:
    """Return a data directory with chats of its own and the installed models."""
    from mixchat.base.settings import data_dir

    place = work / "home"
    place.mkdir(exist_ok=True)
    if not (place / "models").exists():
        (place / "models").symlink_to(data_dir() / "models")
    return place


def main() -> None:
    asked = rig.parsed(__doc__, interrupts=50, pipes=100)
    os.environ["TERM"] = "xterm"
    with TemporaryDirectory(prefix="mixchat-campaign-") as name:
        faults = []
        if asked.interrupts:
            faults += interrupts(asked.interrupts, Path(name))
        if asked.pipes:
            faults += pipes(asked.pipes, Path(name))
    sys.exit(rig.told(faults))


if __name__ == "__main__":
    main()
