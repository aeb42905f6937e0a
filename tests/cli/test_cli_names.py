"""The names of files and directories act on no terminal, whichever command shows them."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from command_line import FAKE
from terminal import Terminal

ACTS = "\x1b]0;pwned\x07\x1b[31m\x9b2J\u202egnp"  # title, colour, clearing, turned text
LEFT = "]0;pwned[31m2Jgnp"  # what may be seen of it
HOSTILE = f"evil{ACTS}\nerror: forged"


@pytest.fixture
def home(tmp_path):
    """A data directory with such a name, and such names in it."""
    home = tmp_path / HOSTILE
    leftover = home / "chats" / f"{HOSTILE}.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("left")
    os.utime(leftover, (time.time() - 10_000,) * 2)
    unfinished = home / "models" / ".unfinished.mixchat.unfinished"
    unfinished.mkdir(parents=True)
    (home / HOSTILE).write_text("text")
    return home


def shown(home, environment, *arguments, typed=""):
    environment = environment | {"MIXCHAT_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    environment["COLUMNS"] = "500"  # so that no line is broken
    with Terminal([*FAKE, *arguments], environment) as terminal:
        if typed:
            terminal.wait_for("[y/N]")
            terminal.type(typed)
        terminal.wait_for_end()
        return terminal.screen.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ["gc"],
        ["chats", HOSTILE],
        ["rm", "unfinished"],
        ["show", f"./{HOSTILE}"],
        ["run", "-m", HOSTILE, "hi"],
        ["plan", f"./{HOSTILE}"],
        [f"--{HOSTILE}"],
    ],
    ids=lambda arguments: " ".join(arguments)[:16],
)
def test_no_name_acts_on_the_terminal(home, environment, arguments):
    """An escape sequence in a directory's name set the title of the window that listed it."""
    screen = shown(home, environment, *arguments, typed="y\r" if arguments[0] == "rm" else "")
    assert screen.strip()
    assert not {"\x07", "\x9b", "\u202e"} & set(screen)
    assert "\x1b]" not in screen
    assert "\x1b[31m" not in screen
    assert "\r\nerror: forged" not in screen
    assert arguments != ["gc"] or f"evil{LEFT}" in screen.replace("\r\n", "")


def test_a_script_gets_the_path_of_the_settings_byte_for_byte(home, environment):
    done = subprocess.run(
        [*FAKE, "config", "--path"],
        env=environment | {"XDG_CONFIG_HOME": os.fsdecode(os.fsencode(home) + b"\xff")},
        capture_output=True,
        check=True,
    )
    assert done.stdout == os.fsencode(home) + b"\xff/mixchat/config.toml\n"
    assert done.stdout.startswith(bytes(Path(home)))
