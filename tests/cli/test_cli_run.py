"""`mixchat run` with a prompt or a pipe: the answer on stdout, and nothing else there."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import FAKE, Done


def prompts_in(path):
    return path.read_text(encoding="utf-8").removesuffix("\n---\n").split("\n---\n")


@pytest.mark.parametrize("answer", ["Hello", "Hello\n", "", "[bold] vector<T> \x1b[31m é 日本"])
def test_the_answer_and_a_newline_are_all_there_is_on_stdout(mixchat, answer):
    done = mixchat("run", "Hi", SCRIPT=json.dumps([answer]))
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


def test_a_model_that_was_removed_while_it_answered_does_not_spoil_the_answer(mixchat):
    """`rm` in another window, and the whole answer ended with 4: its report looked for the model.

    The scripted engine needs no model, and one of this name is not on the machine.
    """
    done = mixchat("run", "-m", "removed", "Hi")
    assert (done.stdout, done.stderr, done.returncode) == (b"Hello\n", b"", 0)


def test_files_go_between_stdin_and_the_argument(mixchat, tmp_path):
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "two").write_text("second\n")
    files = ("-f", str(tmp_path / "one"), "--file", str(tmp_path / "two"))
    mixchat("run", *files, "Why?", stdin=b"before\n", PROMPTS=str(tmp_path / "p"))
    assert (tmp_path / "p").read_text() == "[user]before\n\nfirst\n\nsecond\n\nWhy?\n---\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"", "is empty"), (b"\xff", "is not UTF-8"), (b"\0", "not text")],
)
def test_a_file_that_is_no_text_is_refused(mixchat, tmp_path, content, said):
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    done = mixchat("run", "-f", str(tmp_path / "f"), "Why?")
    assert (done.returncode, done.stdout) == (3, b"")
    assert said in done.stderr.decode()


def test_a_closed_stdin_is_an_empty_one(process):
    assert process("run", "Hi", shell="<&-") == Done(b"Hello\n", b"", 0)


@pytest.mark.parametrize("arguments", [["run", "Hi"], ["list"]])
def test_a_closed_stdout_is_an_error_at_once(process, arguments):
    """The whole answer was computed, for nobody, and the exit code was 0."""
    done = process(*arguments, shell=">&-", SCRIPT='["as if nobody had seen it"]')
    hint = b"hint: To print nothing, send it to /dev/null: >/dev/null\n"
    assert done == Done(b"", b"error: standard output is closed\n" + hint, 1)


def test_with_all_closed_the_exit_code_alone_says_it(process):
    assert process("run", "Hi", shell=">&- 2>&- <&-") == Done(b"", b"", 1)


def test_a_closed_stderr_does_no_harm(process):
    assert process("run", "Hi", shell="2>&-") == Done(b"Hello\n", b"", 0)


def test_the_flags_reach_the_session(mixchat, tmp_path):
    done = mixchat(
        *("run", "Hi", "-s", "Be brief", "--stop", "wo", "--stop", "zz", "-n", "8"),
        SCRIPT='["Hello world"]',
        PROMPTS=tmp_path / "prompts",
    )
    assert done.stdout == b"Hello \n"
    assert prompts_in(tmp_path / "prompts") == ["[system]Be brief[user]Hi"]


def test_the_default_length_of_an_answer_is_said_on_stderr_where_it_cuts(mixchat):
    done = mixchat("run", "Hi", "--ctx-size", "16", "--json")
    assert json.loads(done.stdout)["stop_reason"] == "length"
    assert done.stderr == b"note: cut off after 4 tokens; -n N allows more\n"
    assert done.returncode == 0
    assert not mixchat("run", "Hi", "-n", "4").stderr  # as it was asked for


def test_a_full_context_is_said_on_stderr(mixchat):
    done = mixchat("run", "Hi", "--ctx-size", "10", "-n", "0")
    assert (done.stdout, done.returncode) == (b"He\n", 0)
    assert done.stderr == b"note: the answer is cut off: the context of 10 tokens is full\n"


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


def test_each_token_is_written_as_it_comes(environment):
    with start(environment, DELAY="0.3", SCRIPT=f'["ab{"x" * 300}"]') as process:
        assert process.stdout.read(2) == b"ab"
        assert process.poll() is None
        process.kill()


def test_a_closed_pipe_ends_it_silently_within_a_token(environment):
    with start(environment, DELAY="0.1", SCRIPT=f'["{"x" * 3000}"]') as process:
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.wait(timeout=60) == 141  # the whole answer takes five minutes
        assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "Hi"]])
def test_a_pipe_that_nobody_reads_ends_any_command_silently(process, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        done = process(*arguments, stdout=pipe)
    assert (done.stderr, done.returncode) == (b"", 141)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["run Hi", "run Hi --json", "list --json"])
def test_a_full_disk_under_stdout_is_one_line(process, command):
    done = process(*command.split(), shell=">/dev/full")
    assert done == Done(b"", b"error: standard output: No space left on device\n", 7)


def test_ctrl_c_ends_it_silently(environment):
    with start(environment, DELAY="0.1", SCRIPT=f'["{"x" * 3000}"]') as process:
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == (b"", 130)
    assert set(output) <= set(b"x\n")
