"""A chat's KV cache, saved beside it: what was read is not read again."""

import os
import re

import pytest
from chat_doubles import CharacterTokenizer, TinyTemplate

from mixchat.base.errors import UsageError
from mixchat.base.options import ChatOptions, LoadOptions, SamplingOptions
from mixchat.chat.saved.cache_saver import CacheSaver
from mixchat.chat.saved.chat_saver import ChatSaver
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.chat.session import ChatSession
from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.model import Model, ModelText


@pytest.fixture
def saver_of(tiny_model, tmp_path):
    """A saver of a new engine, as another run has it."""
    from mixchat.loading.loader import load_engine

    options, sampling = LoadOptions(device="cpu", context_size=128), SamplingOptions(temperature=0)
    text, models = ModelText(CharacterTokenizer(), TinyTemplate(), sampling), []

    def new():
        models.append(Model("tiny", lambda: load_engine(tiny_model, options), text))
        session = ChatSession(models[-1], ChatOptions(max_tokens=6))
        return ChatSaver(session, ChatStore(tmp_path / "chats"), "tiny")

    yield new
    for model in models:
        model.close()


def cache_of(saver, **options):
    return CacheSaver(saver, TerminalReporter(), **options)


def asked(saver, question):
    """Ask and save; how many tokens of the prompt were in the cache, and how many there were."""
    *_, finished = saver.session.ask(question)
    saver.save()
    return finished.stats.reused_tokens, finished.stats.prompt_tokens


def test_a_resumed_chat_reads_only_what_is_new(saver_of):
    saver = saver_of()
    with cache_of(saver, create=True):
        asked(saver, "a long first question")
    chat = saver.chat
    for _ in range(2):  # saved once, it is saved from then on
        again = saver_of()
        again.resume(chat)
        with cache_of(again, create=False):
            reused, prompt = asked(again, "next")
            assert prompt - reused < 10
        chat = again.chat


def test_a_link_in_its_place_is_not_written_through(saver_of, tmp_path):
    """Its target was overwritten, with no flag given: a device's node, as root."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for create in (False, True):
        saver = saver_of()
        saver.store.directory.mkdir(exist_ok=True)
        saver.kv_path.symlink_to(precious)
        with cache_of(saver, create=create):
            asked(saver, "question")
        assert saver.kv_path.is_symlink() != create  # replaced, where a cache is asked for
        assert precious.read_text() == "precious"


def test_a_pipe_in_its_place_is_left_as_it_is_and_said(saver_of, capsys):
    saver = saver_of()
    saver.store.directory.mkdir()
    os.mkfifo(saver.kv_path)
    with cache_of(saver, create=False):
        asked(saver, "question")
    assert capsys.readouterr().err == ""
    said = "the prompt cache cannot be written (is not a regular file)"
    cache_of(saver, create=True).leave_chat()
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match=re.escape(said)), cache_of(saver, create=True):
        asked(saver, "question")
    assert saver.kv_path.is_fifo()


def test_each_chat_of_a_run_has_its_own(saver_of):
    saver = saver_of()
    chats = []
    with cache_of(saver, create=True) as cache:
        for question in ("the first of two chats", "another one"):
            asked(saver, question)
            cache.leave_chat()
            chats.append(saver.chat)
            saver.session.clear()
            saver.start_new()
        for chat in chats:
            saver.resume(chat)
            cache.enter_chat()
            reused, prompt = asked(saver, "next")
            assert prompt - reused < 10
            cache.leave_chat()


def test_a_chat_without_a_cache_gets_none_of_another_one_s(saver_of):
    """The words of one chat were written into the file of the next."""
    saver = saver_of()
    asked(saver, "another chat")
    other = saver.chat
    saver.start_new()
    saver.session.clear()
    saver.autosave = False
    with cache_of(saver, create=True) as cache:
        asked(saver, "a secret")
        cache.leave_chat()
        saver.resume(other)
        cache.enter_chat()
        saver.autosave = True
        assert saver.session.engine.held()[0] == []


def test_a_chat_that_was_taken_back_has_no_cache(saver_of):
    saver = saver_of()
    with cache_of(saver, create=True) as cache:
        asked(saver, "question")
        cache.leave_chat()
        saver.session.undo()
    assert not saver.kv_path.exists()


def test_a_damaged_cache_is_said_and_the_chat_continues(saver_of, capsys):
    saver = saver_of()
    with cache_of(saver, create=True):
        asked(saver, "question")
    content = bytearray(saver.kv_path.read_bytes())
    content[-1] ^= 1
    saver.kv_path.write_bytes(content)
    again = saver_of()
    again.resume(saver.chat)
    with cache_of(again, create=False):
        assert asked(again, "next")[0] == 0
    assert "is damaged" in capsys.readouterr().err
