"""The help of a command shows its flags, what they are about most often first."""

from typing import Any

import pytest
import typer

from mixchat.cli.app import app

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_and_explains_the_command(mixchat, name):
    done = mixchat(name, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode()
    flags = {flag for each in COMMANDS[name].params for flag in each.opts if flag[:2] == "--"}
    assert flags <= set(shown.replace(",", " ").split())
    for paragraph in COMMANDS[name].help.split("\n\n"):
        assert "".join(paragraph.split()) in "".join(shown.split())  # lines end in words, too


def test_help_is_a_command_too(mixchat):
    assert mixchat("help", "run").stdout == mixchat("run", "--help").stdout
    assert mixchat("help").stdout == mixchat("--help").stdout
    assert b"No such command 'nosuch'" in mixchat("help", "nosuch").stderr


def test_the_model_is_the_first_flag_of_run(mixchat):
    """`run --help` had 125 lines, in which nobody found -m."""
    _, _, flags = mixchat("run", "--help").stdout.decode().partition("Options:\n")
    assert flags.split()[:2] == ["-m,", "--model"]


def test_after_two_dashes_it_is_a_prompt(mixchat):
    assert mixchat("run", "--", "--help").stdout == b"Hello\n"
