"""`mixchat run` with a prompt or a pipe: the answer on stdout, and nothing else there."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import FAKE, Done
from patience import PATIENCE_S


def prompts_in(path):
    return path.read_text(encoding="utf-8").removesuffix("\n---\n").split("\n---\n")


@pytest.mark.parametrize("answer", ["Hello", "Hello\n", "", "[bold] vector<T> \x1b[31m é 日本"])
def test_the_answer_and_a_newline_are_all_there_is_on_stdout(mixchat, answer):
    """Its report looked for the model: `rm` in another window spoiled a whole answer."""
    done = mixchat("run", "-m", "removed", "Hi", SCRIPT=json.dumps([answer]))
    assert done.stdout.decode() == answer.removesuffix("\n") + "\n"
    assert (done.stderr, done.returncode) == (b"", 0)


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["Hi"], b"", "Hi"),
        ([], b"Hi\n", "Hi"),
        ([], "\ufeffHällo".encode(), "Hällo"),
        (["Sum", "it up"], b"some notes\n\n", "some notes\n\nSum it up"),
        ([""], b"Hi", "Hi"),
        (["-n", "3", "--", "-5 + 3?"], b"", "-5 + 3?"),
    ],
)
def test_the_prompt_is_stdin_and_then_the_argument(mixchat, tmp_path, arguments, stdin, prompt):
    done = mixchat("run", *arguments, stdin=stdin, PROMPTS=tmp_path / "prompts")
    assert done.returncode == 0
    assert prompts_in(tmp_path / "prompts") == [f"[user]{prompt}"]


def test_files_go_between_stdin_and_the_argument(mixchat, tmp_path):
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "two").write_text("second\n")
    files = ("-f", str(tmp_path / "one"), "--file", str(tmp_path / "two"))
    mixchat("run", *files, "Why?", stdin=b"before\n", PROMPTS=str(tmp_path / "p"))
    assert (tmp_path / "p").read_text() == "[user]before\n\nfirst\n\nsecond\n\nWhy?\n---\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["--prompt", "review"], b"x = 1\n", "Review:\n\nx = 1"),
        (["--prompt", "review", "Only", "names"], b"x = 1\n", "Review:\n\nx = 1\n\nOnly names"),
        (["--prompt", "joke"], b"", "Tell a joke."),
    ],
)
def test_a_kept_prompt_gets_the_input(mixchat, tmp_path, arguments, stdin, prompt):
    config = tmp_path / "config"
    (config / "prompts").mkdir(parents=True)
    (config / "config.toml").write_text("")
    (config / "prompts/review.md").write_text("Review:\n\n{{input}}\n")
    (config / "prompts/joke.md").write_text("Tell a joke.\n")
    variables = {"MIXCHAT_CONFIG": str(config / "config.toml"), "PROMPTS": str(tmp_path / "p")}
    assert mixchat("run", *arguments, stdin=stdin, **variables).returncode == 0
    assert prompts_in(tmp_path / "p") == [f"[user]{prompt}"]
    done = mixchat("run", "--prompt", "reviw", "Hi", **variables)
    assert (done.stdout, done.returncode) == (b"", 2)
    assert done.stderr == b"error: there is no prompt 'reviw'\nhint: Did you mean review?\n"


HELLO = Done(b"Hello\n", b"", 0)
IS_CLOSED = (
    b"error: standard output is closed\nhint: To print nothing, send it to /dev/null: >/dev/null\n"
)
IS_FULL = b"error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("command", "shell", "expected"),
    [
        ("run Hi", "<&-", HELLO),
        ("run Hi", "2>&-", HELLO),
        ("run Hi", ">&-", Done(b"", IS_CLOSED, 1)),
        ("list", ">&-", Done(b"", IS_CLOSED, 1)),
        ("run Hi", ">&- 2>&- <&-", Done(b"", b"", 1)),
        ("run Hi", ">/dev/full", Done(b"", IS_FULL, 7)),
        ("run Hi --json", ">/dev/full", Done(b"", IS_FULL, 7)),
        ("list --json", ">/dev/full", Done(b"", IS_FULL, 7)),
    ],
)
def test_streams_that_are_closed_or_full(process, command, shell, expected):
    """Without standard output a whole answer was computed, for nobody, and the exit code was 0."""
    if "full" in shell and not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    assert process(*command.split(), shell=shell) == expected


@pytest.mark.parametrize(
    ("flags", "variables", "answer", "note"),
    [
        ("--ctx-size 16", {}, "Hell", "cut off after 4 tokens; -n N allows more"),
        ("-n 4", {}, "Hell", None),  # as it was asked for
        (
            "--ctx-size 10 -n 0",
            {},
            "He",
            "the answer is cut off: the context of 10 tokens is full",
        ),
        (
            "-n 9",
            {"SCRIPT": '["<think>Hmmm"]', "THINKING": "tags"},
            "",
            "cut off after 9 tokens while the model was thinking; -n N allows more",
        ),
        (
            "",
            {"SCRIPT": '["<think>Hm."]', "THINKING": "tags"},
            "",
            "the model thought, but ended without an answer",
        ),
    ],
)
def test_an_answer_that_is_not_whole_has_a_note_with_the_reason(
    mixchat, flags, variables, answer, note
):
    done = mixchat("run", "Hi", *flags.split(), **variables)
    assert (done.stdout.decode(), done.returncode) == (f"{answer}\n", 0)
    assert done.stderr.decode() == (f"note: {note}\n" if note else "")


def test_verbose_prints_figures_on_stderr(mixchat):
    done = mixchat("run", "Hi", "--verbose", "--seed", "7")
    assert done.stdout == b"Hello\n"
    assert done.stderr.decode().splitlines() == [
        "prompt   8 tokens, 0 of them from the cache",
        "prefill  8 tokens, 16.0 tok/s",
        "         first token after 0.5 s (2 s predicted, with all experts on disk)",
        "         0.1 s waiting for 2 kB from disk, 0.4 s computing, after 1.5 s of loading",
        "decode   6 tokens, 20.0 tok/s (21 predicted, measured 3 days ago)",
        "experts  18 hits, 6 misses (hit rate 75.0%), 16 RAM slots",
        "loaded   6 kB, waited 0.6 s for it",
        "files    read for 0.6 s at 20 kB/s",
        "context  1,000 tokens; --ctx-size can be up to 32,768",
        "seed     7",
        "ended    stop",
    ]


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_no_encoding_breaks_the_answer(process, variables):
    done = process("run", "Hi", SCRIPT='["a é b"]', **variables)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert done.stdout in (b"a ? b\n", "a é b\n".encode())


def start(environment, **variables):
    return subprocess.Popen(
        [*FAKE, "run", "Hi"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | variables,
    )


def test_each_token_is_written_as_it_comes_and_a_closed_pipe_ends_it_silently(environment):
    with start(environment, DELAY="0.1", SCRIPT=f'["{"x" * 3000}"]') as process:
        assert process.stdout.read(1) == b"x"  # the whole answer takes five minutes
        process.stdout.close()
        assert process.wait(timeout=PATIENCE_S) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "Hi"]])
def test_a_pipe_that_nobody_reads_ends_any_command_silently(process, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        done = process(*arguments, stdout=pipe)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_ctrl_c_ends_it_silently(environment):
    with start(environment, DELAY="0.1", SCRIPT=f'["{"x" * 3000}"]') as process:
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (errors, process.returncode) == (b"", 130)
    assert set(output) <= set(b"x\n")
