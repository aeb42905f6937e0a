"""Standard input of `mixchat run`: how much of it is read, when it is waited for, and `-`."""

import os
import subprocess

import pytest
from command_line import FAKE
from patience import PATIENCE_S
from terminal import Terminal

from mixchat.base.context import BYTES_PER_TOKEN
from mixchat.base.model_config import MAX_DEFAULT_TOKENS

LONGEST = MAX_DEFAULT_TOKENS * BYTES_PER_TOKEN
CTRL_C, CTRL_D = "\x03", "\x04"


def prompt_in(path):
    return path.read_text(encoding="utf-8").removesuffix("\n---\n").removeprefix("[user]")


def behind(source, *arguments):
    """A command line that pipes what `source` writes into mixchat."""
    return ["sh", "-c", f'{source} | "$@"', "sh", *FAKE, "run", *arguments]


def test_an_endless_standard_input_is_refused_at_once(environment):
    """`yes | mixchat run` read until 16 GB of memory were gone and the kernel killed it."""
    done = subprocess.run(behind("yes"), capture_output=True, env=environment, timeout=PATIENCE_S)
    first, *_ = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (3, b"")
    assert first.startswith("error: standard input is too long: more than 4.19 MB, but the context")


@pytest.mark.parametrize(("more", "what"), [(0, "the question"), (1, "standard input")])
def test_no_more_is_read_than_the_context_could_hold(mixchat, more, what):
    """Text with more bytes than any tokens of the context stand for is not given to a tokenizer.

    The bound is that of 32,768 tokens here, as the scripted engine's is not known beforehand.
    """
    done = mixchat("run", stdin=b"x" * (LONGEST + more))
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.decode().startswith(f"error: {what} is too long: more than")


def test_a_small_model_reads_less(mixchat, tiny_model):
    done = mixchat("run", "-m", str(tiny_model), stdin=b"x" * (128 * BYTES_PER_TOKEN + 1))
    assert "the context holds 128 tokens" in done.stderr.decode()
    assert "hint: Shorten it: this model reads 127 tokens at most." in done.stderr.decode()


def test_a_context_that_the_model_cannot_do_is_said_before_anything_is_read(mixchat, tiny_model):
    done = mixchat("run", "-m", str(tiny_model), "--ctx-size", "129", stdin=b"\xff")
    assert done.returncode == 2


def test_who_waits_for_standard_input_is_told_after_a_second(environment, tmp_path):
    """`sleep 8 | mixchat run hi` was silent, and nobody knew what it did."""
    wait = f"until test -e {tmp_path / 'end'}; do sleep 0.1; done"
    with Terminal(behind(wait, "Hi"), environment) as terminal:
        terminal.wait_for("note: reading standard input; </dev/null leaves it out")
        (tmp_path / "end").touch()
        terminal.wait_for("Hello")
        assert terminal.wait_for_end() == 0


@pytest.mark.parametrize("flag", ["--schema", "--jsonl"])
def test_who_waits_for_a_silent_pipe_is_told_after_a_second(environment, tmp_path, flag):
    """`mixchat run --schema <(sleep 60)` was silent, and nobody knew what it did."""
    os.mkfifo(tmp_path / "pipe")
    question = [] if flag == "--jsonl" else ["Hi"]
    command = [*FAKE, "run", flag, str(tmp_path / "pipe"), *question]
    with Terminal(command, environment) as terminal:
        terminal.wait_for("note: reading")
        terminal.wait_for("pipe")
        terminal.type(CTRL_C)
        assert terminal.wait_for_end() == 130


def test_a_pipe_that_speaks_at_last_is_read(environment, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [*FAKE, "run", "-f", str(tmp_path / "pipe"), "Why?"]
    with Terminal(command, environment | {"PROMPTS": str(tmp_path / "p")}) as terminal:
        terminal.wait_for("note: reading")
        (tmp_path / "pipe").write_text("text")
        terminal.wait_for("Hello")
        assert terminal.wait_for_end() == 0
    assert prompt_in(tmp_path / "p") == "text\n\nWhy?"


def test_nothing_is_said_with_quiet(environment):
    with Terminal(behind("sleep 2", "-q", "Hi"), environment) as terminal:
        terminal.wait_for("Hello")
        assert terminal.wait_for_end() == 0
        assert b"reading" not in terminal.screen


@pytest.mark.parametrize("arguments", [["-"], ["-f", "-"], ["-f", "-", "-"]])
def test_a_dash_is_standard_input(mixchat, tmp_path, arguments):
    """As everywhere; it was taken for the question, or for the name of a file."""
    done = mixchat("run", *arguments, stdin=b"Why?\n", PROMPTS=tmp_path / "p")
    assert done.returncode == 0
    assert prompt_in(tmp_path / "p") == "Why?"


def test_a_dash_among_files_has_its_place(mixchat, tmp_path):
    (tmp_path / "f").write_text("first")
    files = ("-f", str(tmp_path / "f"), "-f", "-")
    mixchat("run", *files, "Why?", stdin=b"second\n", PROMPTS=tmp_path / "p")
    assert prompt_in(tmp_path / "p") == "first\n\nsecond\n\nWhy?"


@pytest.mark.parametrize("arguments", [["-"], ["-f", "-", "Why?"]])
def test_a_dash_needs_something_on_standard_input(mixchat, arguments):
    done = mixchat("run", *arguments)
    error, hint = done.stderr.decode().splitlines()
    assert (done.returncode, error) == (3, "error: standard input is empty")
    assert "PROMPT" in hint


def test_a_dash_reads_a_terminal_too(environment):
    with Terminal([*FAKE, "run", "-f", "-"], environment) as terminal:
        terminal.wait_for("note: reading standard input; Ctrl-D ends it")
        terminal.type("Hi\n" + CTRL_D)
        terminal.wait_for("Hello")
        assert terminal.wait_for_end() == 0
