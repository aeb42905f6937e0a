"""A chat's KV cache, kept beside it: what was read is not read again."""

import os

import pytest
from chat_doubles import CharacterTokenizer, SamplingOptions, TinyTemplate

from mixchat.chat.saved.chats import ChatStore
from mixchat.chat.saved.keeper import Keeper
from mixchat.cli.chat import ChatCache
from mixchat.errors import UsageError


@pytest.fixture
def keeper_of(tiny_model, tmp_path):
    """A keeper of a new engine, as another run has it."""
    from mixchat.chat.session import ChatSession
    from mixchat.loading.loader import LoadOptions, load_engine

    def new():
        engine = load_engine(tiny_model, LoadOptions(device="cpu", context_size=128))
        sampling = SamplingOptions(temperature=0.0)
        session = ChatSession(
            engine, CharacterTokenizer(), TinyTemplate(), sampling=sampling, max_tokens=6
        )
        return Keeper(session, ChatStore(tmp_path / "chats"), "tiny")

    return new


def asked(keeper, question):
    """Ask and save; how many tokens of the prompt were in the cache, and how many there were."""
    *_, finished = keeper.session.ask(question)
    keeper.save()
    return finished.stats.reused_tokens, finished.stats.prompt_tokens


def test_a_resumed_chat_reads_only_what_is_new(keeper_of):
    keeper = keeper_of()
    with ChatCache(keeper, wished=True):
        asked(keeper, "a long first question")
    chat = keeper.chat
    for _ in range(2):  # kept once, it is kept from then on
        again = keeper_of()
        again.resume(chat)
        with ChatCache(again, wished=False):
            reused, prompt = asked(again, "next")
            assert prompt - reused < 10
        chat = again.chat


def test_without_a_wish_nothing_is_kept(keeper_of):
    keeper = keeper_of()
    with ChatCache(keeper, wished=False):
        asked(keeper, "question")
    assert not keeper.kv_path.exists()


def test_a_link_in_its_place_is_not_written_through(keeper_of, tmp_path):
    """What it led to was overwritten, with no flag given: a device's node, as root."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for wished in (False, True):
        keeper = keeper_of()
        keeper.store.directory.mkdir(exist_ok=True)
        keeper.kv_path.symlink_to(precious)
        with ChatCache(keeper, wished=wished):
            asked(keeper, "question")
        assert keeper.kv_path.is_symlink() != wished  # replaced, where a cache is asked for
        assert precious.read_text() == "precious"


def test_a_pipe_in_its_place_is_left_as_it_is_and_said(keeper_of, capsys):
    keeper = keeper_of()
    keeper.store.directory.mkdir()
    os.mkfifo(keeper.kv_path)
    with ChatCache(keeper, wished=False):
        asked(keeper, "question")
    assert capsys.readouterr().err == ""
    said = "the prompt cache cannot be written (is not a regular file)"
    with ChatCache(keeper, wished=True):
        asked(keeper, "question")
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError) as caught, ChatCache(keeper, wished=True, strict=True):
        asked(keeper, "question")
    assert said in str(caught.value)
    assert keeper.kv_path.is_fifo()


def test_a_chat_that_is_not_kept_has_no_cache(keeper_of):
    keeper = keeper_of()
    keeper.kept = False
    with ChatCache(keeper, wished=True):
        asked(keeper, "question")
    assert not keeper.kv_path.exists()


def test_each_chat_of_a_run_has_its_own(keeper_of):
    keeper = keeper_of()
    chats = []
    with ChatCache(keeper, wished=True) as cache:
        for question in ("the first of two chats", "another one"):
            asked(keeper, question)
            cache.save()
            chats.append(keeper.chat)
            keeper.session.clear()
            keeper.begin()
        for chat in chats:
            keeper.resume(chat)
            cache.load()
            reused, prompt = asked(keeper, "next")
            assert prompt - reused < 10
            cache.save()


def test_a_chat_without_a_cache_gets_none_of_another_one_s(keeper_of):
    """What was said in one chat was written into the file of the next."""
    keeper = keeper_of()
    asked(keeper, "another chat")
    other = keeper.chat
    keeper.begin()
    keeper.session.clear()
    keeper.kept = False
    with ChatCache(keeper, wished=True) as cache:
        asked(keeper, "a secret")
        cache.save()
        keeper.resume(other)
        cache.load()
        keeper.kept = True
        assert keeper.session.engine.held()[0] == []


def test_a_chat_that_was_taken_back_has_no_cache(keeper_of):
    keeper = keeper_of()
    with ChatCache(keeper, wished=True) as cache:
        asked(keeper, "question")
        cache.save()
        keeper.session.undo()
    assert not keeper.kv_path.exists()


def test_what_is_not_new_is_not_written_again(keeper_of):
    keeper = keeper_of()
    with ChatCache(keeper, wished=True):
        asked(keeper, "question")
    before = keeper.kv_path.stat()
    again = keeper_of()
    again.resume(keeper.chat)
    with ChatCache(again, wished=True):
        pass
    assert again.kv_path.stat().st_ino == before.st_ino


def test_a_damaged_cache_is_said_and_the_chat_goes_on(keeper_of, capsys):
    keeper = keeper_of()
    with ChatCache(keeper, wished=True):
        asked(keeper, "question")
    content = bytearray(keeper.kv_path.read_bytes())
    content[-1] ^= 1
    keeper.kv_path.write_bytes(content)
    again = keeper_of()
    again.resume(keeper.chat)
    with ChatCache(again, wished=False):
        assert asked(again, "next")[0] == 0
    assert "is damaged" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_and_no_more(keeper_of, capsys):
    keeper = keeper_of()
    with ChatCache(keeper, wished=True):
        asked(keeper, "question")
        keeper.kv_path.mkdir()
    assert "cannot be written" in capsys.readouterr().err
