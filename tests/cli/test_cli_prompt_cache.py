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
from mixchat.face.model import Model, ModelText
from mixchat.face.model_answer import ModelAnswer
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


@pytest.mark.parametrize(
    ("size", "flags", "reason"),
    [(None, ("--kv-bits", "8"), " was written for another kind of cache, not "), (7, (), "")],
    ids=["other bits", "first bytes"],
)
def test_a_file_that_cannot_be_used_is_noted_once_and_written_again(
    ask, tmp_path, size, flags, reason
):
    file = tmp_path / "f"
    ask("Why?", "--prompt-cache", str(file))
    if size is not None:
        os.truncate(file, size)
    expected = ask("Why?", *flags)
    done = ask("Why?", "--prompt-cache", str(file), *flags)
    assert (done.stdout, done.returncode) == (expected.stdout, 0)
    line = done.stderr.decode()
    assert line.startswith(f"note: {file}{reason}")
    assert line.endswith("; it will be written again\n")
    assert line.count("\n") == 1
    again = ask("Why?", "--prompt-cache", str(file), *flags, "--verbose")
    assert reused(again) == 29


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


def test_what_is_no_prompt_cache_is_refused_before_the_model_is_looked_for(mixchat, tmp_path):
    """A name that was mistyped must not cost somebody a file."""
    (tmp_path / "notes").write_bytes(bytes(99))
    flags = ("-m", "nonsense", "--prompt-cache", str(tmp_path / "notes"))
    done = mixchat("run", "Hi", *flags, fake=False)
    assert (done.stdout, done.returncode) == (b"", 2)
    assert b"exists, and was not written by --prompt-cache" in done.stderr
    assert (tmp_path / "notes").read_bytes() == bytes(99)
