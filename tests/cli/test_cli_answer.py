"""Answers for scripts: JSON, code alone, all at once, nothing but errors on stderr."""

import json

import pyte
import pytest
from command_line import FAKE
from terminal import Terminal

CODE = "Do this:\n\n```sh\necho '[hi]'\n```\n\nor\n\n```py\nprint(1)\n```\n"


def script(*answers):
    return {"SCRIPT": json.dumps(answers)}


def test_json_has_answer_ids_counts_times_and_why_it_ended(mixchat):
    done = mixchat("run", "--json", "--seed", "3", "-m", "demo", "Hi", **script("Hallo 😀"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    found = json.loads(done.stdout)
    assert list(found) == ["model", "answer", "ids", "stop_reason", "seed", "usage", "timings"]
    assert (found["model"], found["answer"], found["seed"]) == ("demo", "Hallo 😀", 3)
    assert found["ids"] == [*map(ord, "Hallo 😀")]
    assert found["stop_reason"] == "stop"
    assert found["usage"] == {
        "prompt_tokens": len("[user]Hi"),
        "cached_tokens": 0,
        "generated_tokens": 8,
        "context_tokens": 1000,
    }
    assert found["timings"] == {
        "prefill_seconds": 0.5,
        "decode_seconds": 0.25,
        "tokens_per_second": 28.0,
    }


@pytest.mark.parametrize(
    ("flags", "reason", "answer"),
    [
        (("-n", "2"), "length", "He"),
        (("--stop", "lo"), "stop_string", "Hel"),
        (("--ctx-size", "11", "-n", "0"), "context", "Hel"),
    ],
)
def test_json_says_why_an_answer_ended_early(mixchat, flags, reason, answer):
    found = json.loads(mixchat("run", "--json", "-q", *flags, "Hi", **script("Hello")).stdout)
    assert (found["stop_reason"], found["answer"]) == (reason, answer)


def test_json_on_a_terminal_has_no_character_that_acts_on_it(environment):
    variables = environment | script("a\u009bb\u202ec")
    with Terminal([*FAKE, "run", "--json", "Hi"], variables) as terminal:
        assert terminal.wait_for_end() == 0
    assert json.loads(terminal.screen)["answer"] == "a\u009bb\u202ec"
    assert terminal.screen.isascii()


def test_extract_prints_the_first_block_of_code_alone(mixchat):
    done = mixchat("run", "-x", "Hi", **script(CODE))
    assert (done.returncode, done.stdout) == (0, b"echo '[hi]'\n")


def test_extract_without_code_prints_nothing_and_says_so(mixchat):
    done = mixchat("run", "--extract", "Hi", **script("No code."))
    assert (done.returncode, done.stdout) == (9, b"")
    assert done.stderr.startswith(b"error: the answer contains no code block\nhint: ")


def test_no_stream_prints_the_same_at_once(mixchat):
    whole = mixchat("run", "--no-stream", "Hi", **script(CODE))
    assert whole.stdout == mixchat("run", "Hi", **script(CODE)).stdout == CODE.encode()


def test_quiet_says_nothing_but_errors(mixchat):
    flags = ("run", "--ctx-size", "11", "Hi")
    assert b"note: " in mixchat(*flags, **script("Hello")).stderr
    assert mixchat(*flags, "-q", **script("Hello")).stderr == b""
    failed = mixchat("run", "-q", "Hi", **script([{"raise": "PromptError", "with": "no"}]))
    assert (failed.returncode, failed.stderr) == (3, b"error: no\n")


@pytest.mark.parametrize("flag", ["--json", "-x"])
def test_flags_for_one_answer_are_not_for_a_chat(mixchat, monkeypatch, flag):
    monkeypatch.setattr("mixchat.cli.run.read_prompt", lambda *given: None)
    done = mixchat("run", flag)
    assert done.returncode == 2
    assert b"needs a question, not a chat" in done.stderr


def test_a_failed_answer_prints_no_json(mixchat):
    done = mixchat("run", "--json", "Hi", **script(["a", {"raise": "RuntimeError", "with": "no"}]))
    assert (done.returncode, done.stdout) == (1, b"")


THOUGHT = script("<think>Hm.</think>Yes") | {"THINKING": "tags enable_thinking"}


def test_thinking_is_left_out_of_pipes(mixchat):
    for flags in ((), ("-q",), ("--no-stream",), ("--think", "show")):
        done = mixchat("run", *flags, "Hi", **THOUGHT)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"Yes\n", b"")


def test_json_has_thinking_apart_from_the_answer(mixchat):
    found = json.loads(mixchat("run", "--json", "Hi", **THOUGHT).stdout)
    assert (found["answer"], found["thinking"]) == ("Yes", "Hm.")
    assert found["ids"] == [*map(ord, "Yes")]
    assert found["usage"]["generated_tokens"] == len("<think>Hm.</think>Yes") + 1


@pytest.mark.parametrize(
    ("flags", "shown", "left"),
    [
        ((), True, ["(thought for 18 tokens)"]),
        (("--raw",), True, ["Hm.", "(thought for 18 tokens)"]),
        (("--think", "hide"), False, []),
    ],
)
def test_a_terminal_shows_thinking_until_the_answer_begins(environment, flags, shown, left):
    variables = environment | THOUGHT | {"DELAY": "0.05"}
    with Terminal([*FAKE, "run", *flags, "Hi"], variables) as terminal:
        assert terminal.wait_for_end() == 0
        output = terminal.screen.decode()
    assert ("\x1b[2mH" in output) == shown
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(output)
    rows = [row.strip() for row in screen.display if row.strip()]
    assert rows == [*left, "Yes"]
