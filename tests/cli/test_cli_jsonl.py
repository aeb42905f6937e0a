"""`run --jsonl`: a file of prompts is answered in order, and what is cut off continues."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from tiny_tokenizer import write_tokenizer

from mixchat.base.errors import CheckpointError, PromptError, UsageError
from mixchat.face.events import End, Failed
from mixchat.serving.answer_file import open_answers, write_answers
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.lines import Line


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    return install(write_tokenizer(make_checkpoint(vocab_size=262, std=0.1)))


@pytest.fixture
def run(model: Path, mixchat: Callable[..., Any]) -> Callable[..., Any]:
    """Run `mixchat run -m MODEL ARGS`."""

    def run(*arguments: object, stdin: bytes = b"") -> Any:
        return mixchat("run", "-m", *map(str, (model, *arguments)), stdin=stdin, fake=False)

    return run


def lines_of(count: int, **fields: Any) -> bytes:
    lines = [
        {"prompt": f"Question {n}", "seed": n, "max_tokens": 6, **fields} for n in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def parsed(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_pipe_is_answered_in_order_and_the_note_counts(run):
    done = run("--jsonl", "-", stdin=lines_of(9))
    assert done.returncode == 0
    answers = parsed(done.stdout)
    assert [answer["line"] for answer in answers] == list(range(1, 10))
    assert all(answer["usage"]["generated_tokens"] <= 6 for answer in answers)
    assert done.stderr.startswith(b"note: 9 lines in ")
    assert run("-q", "--jsonl", "-", stdin=lines_of(1)).stderr == b""


def test_flags_apply_to_lines_that_say_nothing_else(run, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"prompt": "Hi"}\n{"prompt": "Hi", "max_tokens": 2}\n')
    done = run("--jsonl", file, "-n", 3, "--seed", 5, "--temp", 0, "-s", "Be brief")
    long, short = parsed(done.stdout)
    assert (long["usage"]["generated_tokens"], short["usage"]["generated_tokens"]) == (3, 2)
    assert long["seed"] == short["seed"] == 5
    assert long["answer"].startswith(short["answer"])


def test_one_answer_is_that_of_run_with_exact_prompts(run):
    alone = run("--exact-prompts", "--seed", 3, "-n", 9, "-q", "Tell me more")
    line = json.dumps({"prompt": "Tell me more", "seed": 3, "max_tokens": 9}).encode()
    (answer,) = parsed(run("--jsonl", "-", stdin=line).stdout)
    assert answer["answer"].rstrip("\n") + "\n" == alone.stdout.decode()


def test_what_was_cut_off_continues_where_it_was(run, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(5))
    whole = run("--jsonl", source).stdout
    kept = whole.splitlines(keepends=True)
    for cut in (0, 1, 30, -1):
        out.write_bytes(b"".join(kept[:2]) + kept[2][:cut])
        done = run("--jsonl", source, "--resume-from", out)
        assert (done.returncode, done.stdout) == (0, b"")
        assert [(line["line"], line["answer"]) for line in parsed(out.read_bytes())] == [
            (line["line"], line["answer"]) for line in parsed(whole)
        ]
        assert b"note: 3 lines" in done.stderr
        assert done.stderr.endswith(b", 2 answered already\n")
    again = run("--jsonl", source, "--resume-from", out)
    assert again.stderr.startswith(b"note: 0 lines in ")
    assert again.stderr.endswith(b", 5 answered already\n")


def test_a_file_that_is_answered_loads_no_model(run, tmp_path, monkeypatch):
    """A model of 26 GB was loaded, to say that nothing was left."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(2) + b"\n")
    assert run("--jsonl", source, "--resume-from", out).returncode == 0
    monkeypatch.setattr("mixchat.face.local_models.open_model", None)
    again = run("--jsonl", source, "--resume-from", out)
    assert (again.returncode, again.stdout) == (0, b"")
    assert again.stderr.endswith(b", 2 answered already\n")


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"line": 0}\n', '["line"]\n'])
def test_another_file_is_left_as_it_is(run, tmp_path, content):
    out = tmp_path / "out"
    out.write_text(content)
    done = run("--jsonl", "-", "--resume-from", out, stdin=lines_of(1))
    assert done.returncode == 2
    assert b"a line that --jsonl has not written" in done.stderr
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jsonl", "-", "Hi"], "--jsonl does not go with PROMPT"),
        (["--jsonl", "-", "--json", "-f", "x"], "does not go with --file, --json"),
        (["--jsonl", "/nonexistent"], "--jsonl /nonexistent: No such file"),
        (["--jsonl", "/tmp"], "Is a directory"),
        (["--parallel", "3", "Hi"], "--parallel needs --jsonl FILE"),
        (["--resume-from", "x", "Hi"], "--resume-from needs --jsonl FILE"),
        (["--keep-failed", "Hi"], "--keep-failed needs --jsonl FILE"),
        (["--jsonl", "-", "--keep-failed"], "--keep-failed needs --resume-from OUT"),
        (["--jsonl", "-", "--resume-from", "/dev/null"], "is not a regular file"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert len(done.stderr.splitlines()) <= 2


def test_a_fault_of_the_machine_is_no_answer_and_the_line_is_left_for_the_next_run(tmp_path):
    """It was written as the answer, and resuming left the line out."""

    def answers(lines):
        for number, _ in lines:
            line = Line(number)
            fault = CheckpointError("experts-000.safetensors cannot be read")
            line.take(End("stop") if number == 1 else Failed(fault))
            yield line

    out = tmp_path / "out"
    with open_answers(out) as file, pytest.raises(CheckpointError):
        write_answers(answers(enumerate([b"{}"] * 3, 1)), file, print)
    with open_answers(out) as file:
        assert file.last == 1


def answer_with(out: Path, lines: int, errors: set[int], *, keep_failed: bool = False) -> list[int]:
    """Answer so many lines, those in `errors` with an error; return the numbers that were asked."""
    asked = []

    def answers(numbered: Any) -> Iterator[Line]:
        for number, _ in numbered:
            asked.append(number)
            line = Line(number)
            line.take(Failed(RequestError("no")) if number in errors else End("stop"))
            yield line

    with open_answers(out, keep_failed=keep_failed) as file:
        numbered = (line for line in enumerate([b"{}"] * lines, 1) if file.want(line[0]))
        write_answers(answers(numbered), file, lambda text: None)
    return asked


def test_lines_that_failed_are_tried_again_and_their_last_answer_counts(tmp_path):
    """They were never tried again, and the second run exited with 0."""
    out = tmp_path / "out"
    with pytest.raises(PromptError, match="2 of 3 lines"):
        answer_with(out, 3, {1, 2})
    with pytest.raises(PromptError, match="1 of 5 lines"):
        answer_with(out, 5, {2})
    assert [answer["line"] for answer in parsed(out.read_bytes())] == [1, 2, 3, 1, 2, 4, 5]
    with pytest.raises(PromptError, match="1 of 5 lines"):
        assert answer_with(out, 5, set(), keep_failed=True) == []
    assert answer_with(out, 5, set()) == [2]
    assert answer_with(out, 5, set()) == []
    before = out.read_bytes()
    out.write_bytes(before + b'{"line": 2, "error": "after an answer"}\n')
    with pytest.raises(UsageError, match="has not written"):
        answer_with(out, 5, set())


def test_an_answer_file_of_one_endless_line_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mixchat.serving.answer_file.MAX_SIZE", 1000)
    out = tmp_path / "out"
    with open(out, "wb") as file:
        file.write(b'{"line": 1, "answer": "')
        file.truncate(1 << 33)  # sparse: reading it would take 8 GB
    with pytest.raises(UsageError, match="has not written"):
        answer_with(out, 1, set())


def test_the_lines_may_come_from_a_pipe_with_a_name(run):
    """It said "is not a regular file" for `--jsonl <(command)`."""
    reading, writing = os.pipe()
    os.write(writing, lines_of(2))
    os.close(writing)
    done = run("--jsonl", f"/dev/fd/{reading}")
    os.close(reading)
    assert (done.returncode, len(parsed(done.stdout))) == (0, 2)


def test_a_second_run_with_the_same_file_of_answers_is_refused_and_leaves_it_alone(run, tmp_path):
    """Both wrote: the second one took the line that the first was writing for one cut off."""
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    with open_answers(out):
        begun = b'{"line": 1, "ans'
        out.write_bytes(begun)
        done = run("--jsonl", "-", "--resume-from", link, stdin=lines_of(1))
        assert done.returncode == 2
        assert b"another mixchat is writing its answers there" in done.stderr
        assert out.read_bytes() == begun
    with open_answers(link) as file:
        assert file.last == 0
    assert sorted(tmp_path.iterdir()) == [link, out]


def test_ctrl_c_leaves_whole_lines_and_says_nothing_else(model, environment, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ("-m", str(model), "--jsonl", "-", "--resume-from", str(out))
    command = [sys.executable, "-m", "mixchat", "run", *flags]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        assert process.stderr is not None
        process.stdin.write(lines_of(3))
        process.stdin.flush()  # and it stays open
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert b"Traceback" not in process.stderr.read()
    assert len(parsed(out.read_bytes())) == 3
