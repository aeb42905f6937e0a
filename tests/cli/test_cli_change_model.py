"""`/model NAME` with real engines: one is closed before another is loaded, and comes back."""

import errno
import shutil
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
from chat_typing import CTRL_D, Chat
from tiny_tokenizer import write_tokenizer

import mixchat.loading.loader
from mixchat.base.errors import MixchatError, ResourceError
from mixchat.base.options import ChatOptions, LoadOptions
from mixchat.chat.saved.cache_saver import CacheSaver
from mixchat.chat.terminal.open_chat import OpenChat, Saving
from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.local_models import LocalModels

LOAD = LoadOptions(device="cpu")
REPORTER = TerminalReporter(quiet=True)


@pytest.fixture(scope="module")
def installed(make_checkpoint, install):
    """Two models with a tokenizer; the second has other weights, and a longer context."""
    shapes = {"first": {"max_position_embeddings": 96}, "second": {"seed": 1}}
    return {
        name: install(write_tokenizer(make_checkpoint(vocab_size=262, **shape)))
        for name, shape in shapes.items()
    }


@pytest.fixture
def home(installed, tmp_path, monkeypatch):
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    for name, directory in installed.items():
        (models / name).symlink_to(directory)
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def loads(monkeypatch):
    """Notes what is loaded, and how many engines are open then; lets loads fail."""
    real, seen = mixchat.loading.loader.build_engine, Loads()

    def build_engine(installed, options, note):
        directory = installed.directory
        seen.names.append(directory.name)
        seen.open_then.append(sum(not engine.is_closed for engine in seen.engines))
        seen.left_over += [half() for half in seen.halves if half() is not None]
        half_loaded = Loads()
        seen.halves.append(weakref.ref(half_loaded))
        if directory.name in seen.failing:
            raise seen.failing.pop(directory.name)
        seen.engines.append(real(installed, options, note))
        return seen.engines[-1]

    monkeypatch.setattr(mixchat.loading.loader, "build_engine", build_engine)
    return seen


@pytest.fixture
def reports():
    """The answers that were reported, by model."""
    return defaultdict(list)


class Loads:
    def __init__(self):
        self.names, self.open_then, self.engines, self.failing = [], [], [], {}
        self.halves, self.left_over = [], []


@pytest.fixture
def start(home, loads, reports):
    """Open `first` in a chat."""

    def start(load=LOAD):
        def new_report(engine, predictor):
            return reports[chat.saver.model].append

        chat = OpenChat(
            LocalModels(load, REPORTER, usual="first"),
            "first",
            ChatOptions(sampling={"temperature": 0.0}, max_tokens=3),
            REPORTER,
            new_report=new_report,
            saving=Saving(),
        )
        chat.open()
        return chat

    return start


def ask(saver, question="hell"):
    *_, finished = saver.session.ask(question)
    saver.save()
    return finished.stats


def test_one_engine_is_closed_before_another_is_loaded(start, loads):
    chat = start()
    ask(chat.saver)
    asked, before = chat.saver.session.history, chat.saver.session.engine
    chat.models.check("second", "first")
    chat.change("second")
    assert (loads.names, loads.open_then) == (["first", "second"], [0, 0])
    assert before.is_closed
    assert [m.content for m in chat.saver.session.history] == [m.content for m in asked]
    assert chat.saver.session.engine.context_size == 128
    assert ask(chat.saver, "he").reused_tokens == 0
    assert chat.saver.store.load("last").model == "second"


@pytest.mark.parametrize(
    "fault", [ResourceError("no room"), MemoryError(), KeyboardInterrupt(), OSError(errno.EIO, "x")]
)
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(start, loads, fault):
    chat = start()
    ask(chat.saver)
    seed, ids = chat.saver.session.sampling["seed"], chat.saver.session.history[1].ids
    loads.failing["second"] = fault
    with pytest.raises(type(fault)):
        chat.change("second")
    assert loads.names == ["first", "second", "first"]
    assert loads.open_then == [0, 0, 0]
    assert loads.left_over == []  # the error held what was half loaded
    assert chat.saver.model == "first"
    assert chat.saver.session.history[1].ids == ids
    assert chat.saver.session.sampling["seed"] == seed
    assert ask(chat.saver, "he").generated_tokens == 3


def test_where_neither_can_be_loaded_the_error_names_both(start, loads):
    chat = start()
    loads.failing |= {"second": ResourceError("no room"), "first": ResourceError("none either")}
    with pytest.raises(MixchatError, match="no room; nor can first be loaded again: none either"):
        chat.change("second")
    assert chat.saver.session.engine.is_closed
    with CacheSaver(chat.saver, REPORTER, create=True):
        pass  # there is nothing to save
    chat.close()


@pytest.mark.parametrize(
    ("name", "context", "error"),
    [
        ("third", None, "there is no model 'third'"),
        ("instruct", None, "not on this machine"),
        ("", None, "there is no model ''"),
        ("first", None, "this chat already has the model first"),
        ("experts-001.safetensors", None, r"experts-001\.safetensors"),
        ("tokenizer.json", None, r"tokenizer\.json"),
        ("second", 129, "129"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_closed(start, loads, home, name, context, error):
    chat = start()
    if "." in name:  # a model with this damaged file
        damaged = shutil.copytree(home / "models" / "second", home / "models" / name)
        (damaged / name).write_bytes(b"{")
    models = LocalModels(replace(LOAD, context_size=context), REPORTER, usual="first")
    with pytest.raises(MixchatError, match=error):
        models.check(name, "first")
    assert loads.names == ["first"]
    assert ask(chat.saver).generated_tokens == 3


def test_others_are_those_with_another_directory(start, home):
    models = start().models
    assert models.others("first") == ["second"]
    assert models.others(str(home / "models" / "second")) == ["first"]
    assert models.others("gone") == ["first", "second"]


@pytest.mark.parametrize("beside", [True, False])
def test_the_kv_cache_comes_back_with_the_model_that_stays(start, loads, tmp_path, beside):
    chat = start()
    named = None if beside else tmp_path / "cache"
    loads.failing["second"] = ResourceError("no room")
    with CacheSaver(chat.saver, REPORTER, named=named, create=True) as cache:
        ask(chat.saver)
        with pytest.raises(ResourceError), cache.changing_model():
            chat.change("second")
        assert ask(chat.saver, "he").reused_tokens == 3


def test_the_kv_cache_of_the_new_model_is_saved_in_place_of_the_old_one_s(start, capsys):
    chat = start()
    with CacheSaver(chat.saver, REPORTER, create=True) as cache:
        ask(chat.saver)
        with cache.changing_model():
            chat.change("second")
        ask(chat.saver, "he")
    with CacheSaver(chat.saver, REPORTER, create=True):
        assert ask(chat.saver, "ll").reused_tokens > 6
    assert capsys.readouterr().err == ""


def test_a_chat_types_it(start, reports):
    opened = start()
    typed = "hell\r/model second\rhe\r/model\r" + CTRL_D

    def change(name):
        opened.change(name)
        return opened.after_turn, opened.reading_time

    opened.models.change = change
    chat = Chat(opened.session, typed, models=lambda _: opened.models)
    assert chat.errors == []
    assert len(reports["second"]) == 1
    assert "(the model is second from here on)" in chat.text
    assert opened.saver.model == "second"
