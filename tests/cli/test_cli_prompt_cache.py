"""`mixchat run --prompt-cache FILE`: the next run starts from what the last one has read."""

import errno
import os
import stat
import sys
from dataclasses import replace

import pytest

from mixchat.chat.saved.cache_saver import FILE_START
from mixchat.face.events import Piece
from mixchat.face.local_models import LocalModels
from mixchat.face.model import Model, ModelAnswer, ModelText
from mixchat.text.detokenizer import TokenBytes

_FIRST = 30  # the tiny model's 97 tokens are the characters from here on


class Tokenizer:
    """A token is a printable character of ASCII."""

    token_bytes = TokenBytes([chr(token + _FIRST).encode() for token in range(97)], {})


class Template:
    """`[user]Hi[assistant]Hello`; no token ends an answer."""

    continues_prompt = False
    stop_ids = frozenset()
    thinking = None

    def encode(self, messages, variables=None):
        text = "".join(f"[{message.role}]{message.content}" for message in messages)
        return [ord(character) - _FIRST for character in text]


@pytest.fixture
def exact_model(tiny_checkpoint, install):
    """A model in fp32: reading a prompt in other pieces changes its numbers too little to change a
    token."""
    return install(tiny_checkpoint, quant_type="none")


@pytest.fixture
def ask(mixchat, monkeypatch, exact_model):
    """Runs `mixchat run ARGS` with the tiny model, greedily, for 8 tokens."""
    from mixchat.loading.loader import load_engine

    models = []

    def opened(name, load, reporter, *, least_context, shown):
        options = replace(load, device="cpu")
        models.append(Model(name, lambda: load_engine(exact_model, options), text))
        return models[-1]

    text = ModelText(Tokenizer(), Template())
    monkeypatch.setattr("mixchat.face.local_models.open_model", opened)
    monkeypatch.setattr(LocalModels, "predictor", lambda *given: lambda: None)
    yield lambda *arguments: mixchat(
        *("run", "-s", "A long text.", "--temp", "0", "-n", "8", *arguments), fake=False
    )
    for model in models:
        model.close()


def reused(done):
    return int(done.stderr.decode().split(" of them from the cache")[0].split()[-1])


def test_the_next_run_reads_only_what_is_new(ask, tmp_path):
    file = str(tmp_path / "f")
    for question, expected in (("Why?", 0), ("Why?", 29), ("Where?", 28), ("Where?", 31)):
        done = ask(question, "--prompt-cache", file, "--verbose")
        assert (done.returncode, reused(done)) == (0, expected)
        assert done.stdout == ask(question).stdout


def test_nothing_is_said_of_it_and_only_its_owner_reads_it(ask, tmp_path):
    file = tmp_path / "f"
    for _ in range(2):
        assert ask("Why?", "--prompt-cache", str(file)).stderr == b""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.glob("f*")) == [file]
    assert file.read_bytes()[8:].startswith(FILE_START)


def test_a_chat_is_saved_at_its_end(ask, tmp_path, monkeypatch):
    def chat(active, prompt, run_command):
        for question in ("Why?", "Where?"):
            *_, finished = active.session.ask(question)
            active._opened.after_turn(finished)

    monkeypatch.setattr("mixchat.chat.terminal.active_chat.ActiveChat.run", chat)
    monkeypatch.setattr("mixchat.cli.run.read_prompt", lambda *given: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    flags = ("--prompt-cache", str(tmp_path / "f"), "--verbose")
    assert reused(ask(*flags)) == 0
    assert reused(ask(*flags)) == 29  # at its first question


def interrupting(monkeypatch, error):
    """Raise the error in place of the fifth piece of an answer."""
    follow, pieces = ModelAnswer.__next__, []

    def interrupted(self):
        event = follow(self)
        pieces.extend([event] if isinstance(event, Piece) else [])
        if len(pieces) > 4:
            raise error
        return event

    monkeypatch.setattr(ModelAnswer, "__next__", interrupted)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_what_was_read_is_saved_when_the_answer_is_cut_off(ask, tmp_path, monkeypatch, error, code):
    flags = ("Why?", "--prompt-cache", str(tmp_path / "f"))
    with monkeypatch.context() as patch:
        interrupting(patch, error)
        assert ask(*flags).returncode == code
    assert reused(ask(*flags, "--verbose")) == 29


def test_a_file_of_other_bits_is_noted_once_and_written_again(ask, tmp_path):
    file = str(tmp_path / "f")
    ask("Why?", "--prompt-cache", file)
    expected = ask("Why?", "--kv-bits", "8")
    done = ask("Why?", "--prompt-cache", file, "--kv-bits", "8")
    assert (done.stdout, done.returncode) == (expected.stdout, 0)
    line = done.stderr.decode()
    assert line.startswith(f"note: {file} was written for another kind of cache, not ")
    assert line.endswith("; it will be written again\n")
    assert line.count("\n") == 1
    again = ask("Why?", "--prompt-cache", file, "--kv-bits", "8", "--verbose")
    assert reused(again) == 29


@pytest.mark.parametrize("size", [7, 4200])
def test_a_file_cut_short_is_noted_and_written_again(ask, tmp_path, size):
    file = tmp_path / "f"
    expected = ask("Why?", "--prompt-cache", str(file))
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    done = ask("Why?", "--prompt-cache", str(file))
    assert (done.stdout, done.returncode) == (expected.stdout, 0)
    assert done.stderr.decode().endswith("; it will be written again\n")
    assert done.stderr.count(b"\n") == 1
    assert file.read_bytes() == whole


def full_disk(monkeypatch):
    from mixchat.engine import prompt_cache

    def write(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prompt_cache, "write_all", write)


def test_a_full_disk_is_one_line_and_the_answer_is_there(ask, tmp_path, monkeypatch):
    expected = ask("Why?").stdout
    full_disk(monkeypatch)
    file = tmp_path / "f"
    done = ask("Why?", "--prompt-cache", str(file))
    assert (done.stdout, done.returncode) == (expected, 7)
    line = f"error: {file}: the prompt cache cannot be written (No space left on device)\n"
    assert done.stderr.decode() == line
    assert not list(tmp_path.glob("f*"))


def test_what_went_wrong_first_gives_the_exit_code(ask, tmp_path, monkeypatch):
    interrupting(monkeypatch, KeyboardInterrupt())
    full_disk(monkeypatch)
    done = ask("Why?", "--prompt-cache", str(tmp_path / "f"))
    assert done.returncode == 130
    assert done.stderr.startswith(b"note: ")
    assert done.stderr.endswith(b"the prompt cache cannot be written (No space left on device)\n")


def refused(mixchat, path):
    """Before the model is looked for, which would give exit code 4."""
    done = mixchat("run", "Hi", "-m", "nonsense", "--prompt-cache", str(path), fake=False)
    assert (done.stdout, done.returncode) == (b"", 2)
    return done.stderr.decode()


def test_a_directory_that_is_not_there_is_found_at_once(mixchat, tmp_path):
    assert "there is no directory" in refused(mixchat, tmp_path / "typo" / "f")


@pytest.mark.parametrize("data", [b"my notes", b"\xf8", bytes(99)])
def test_a_file_of_another_kind_is_left_as_it_is(mixchat, tmp_path, data):
    """A name that was mistyped must not cost somebody a file."""
    file = tmp_path / "notes.txt"
    file.write_bytes(data)
    if data != b"\xf8":  # which may be what is left of a prompt cache
        assert "exists, and was not written by" in refused(mixchat, file)
    assert file.read_bytes() == data


def test_a_file_that_was_made_while_it_answered_is_left_as_it_is(ask, tmp_path, monkeypatch):
    from mixchat.chat.session import ChatSession

    file, ask_session = tmp_path / "f", ChatSession.ask

    def meanwhile(session, text):
        file.write_text("notes")
        yield from ask_session(session, text)

    expected = ask("Why?").stdout
    monkeypatch.setattr(ChatSession, "ask", meanwhile)
    done = ask("Why?", "--prompt-cache", str(file))
    assert (done.stdout, done.returncode, file.read_text()) == (expected, 2, "notes")


def test_what_is_no_file_is_left_as_it_is(mixchat, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path in (tmp_path, fifo, "/dev/null"):
        assert "exists, and was not written by" in refused(mixchat, path)
    assert "cannot be read" in refused(mixchat, circle)
