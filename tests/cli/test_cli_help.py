"""The help of a command fits on a screen, and --help-all shows all of it."""

from typing import Any

import pytest
import typer

from mixchat.cli.app import app
from mixchat.cli.flags.settings import _MOST_USED

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LONG = ("run", "serve", "download", "worker", "plan", "bench", "calibrate")


def flags_of(name: str) -> set[str]:
    return {flag for each in COMMANDS[name].params for flag in each.opts if flag[:2] == "--"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_a_screen(mixchat, monkeypatch, name):
    """`run --help` had 125 lines, in which nobody found -m."""
    monkeypatch.setenv("COLUMNS", "80")
    done = mixchat(name, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode()
    assert len(shown.splitlines()) <= 30
    missing = [flag for flag in flags_of(name) if f"{flag} " not in shown.replace(",", " ")]
    assert not missing or f"mixchat {name} --help-all" in shown


@pytest.mark.parametrize("name", LONG)
def test_help_all_shows_every_flag_and_explains_the_command(mixchat, name):
    shown = mixchat(name, "--help-all").stdout.decode()
    words = shown.replace(",", " ").split()
    assert flags_of(name) <= set(words)
    for paragraph in COMMANDS[name].help.split("\n\n"):
        assert "".join(paragraph.split()) in "".join(shown.split())  # lines end in words, too


def test_after_two_dashes_it_is_a_prompt(mixchat):
    assert mixchat("run", "--", "--help-all").stdout == b"Hello\n"


def test_each_flag_that_is_most_used_is_some_commands(mixchat):
    assert {*_MOST_USED} <= {each.name for name in LONG for each in COMMANDS[name].params}
