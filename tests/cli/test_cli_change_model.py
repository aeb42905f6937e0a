"""`/model NAME` with real engines: one is closed before another is loaded, and comes back."""

import errno
import weakref
from collections import defaultdict
from functools import partial

import pytest
from chat_typing import CTRL_D, Chat
from tiny_tokenizer import write_tokenizer

import mixchat.loading.loader
from mixchat.base.errors import MixchatError, ResourceError
from mixchat.base.options import LoadOptions
from mixchat.chat.saved.chat_saver import ChatSaver
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.cli.cache_file import CacheSaver, FileBesideChat, NamedFile
from mixchat.cli.change_model import ModelChanger, save_report
from mixchat.cli.opening import open_session
from mixchat.cli.output.print_answer import OutputOptions

LOAD = LoadOptions(device="cpu")


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
    real, seen = mixchat.loading.loader.load_engine, Loads()

    def load_engine(directory, options, note):
        seen.names.append(directory.name)
        seen.open_then.append(sum(not engine.is_closed for engine in seen.engines))
        seen.left_over += [half() for half in seen.halves if half() is not None]
        half_loaded = Loads()
        seen.halves.append(weakref.ref(half_loaded))
        if directory.name in seen.failing:
            raise seen.failing.pop(directory.name)
        seen.engines.append(real(directory, options, note))
        return seen.engines[-1]

    monkeypatch.setattr(mixchat.loading.loader, "load_engine", load_engine)
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
    """Open `first`, and return the saver of a chat with it and what changes its model."""

    def hooks(model):
        return reports[model].append, lambda tokens, first: None

    def start(load=LOAD):
        open_model = partial(
            open_session,
            load=load,
            output=OutputOptions(False, False, True, False, True),
            sampling={"temperature": 0.0},
            system=None,
            max_tokens=3,
            stop=[],
            overflow="stop",
        )
        session = open_model("first")
        saver = ChatSaver(session, ChatStore(home / "chats"), "first")
        return saver, ModelChanger(saver, load, open_model, hooks)

    return start


def ask(saver, question="hell"):
    *_, finished = saver.session.ask(question)
    saver.save()
    return finished.stats


def test_one_engine_is_closed_before_another_is_loaded(start, loads):
    saver, models = start()
    ask(saver)
    asked, before = saver.session.history, saver.session.engine
    models.check("second")
    models.change("second")
    assert (loads.names, loads.open_then) == (["first", "second"], [0, 0])
    assert before.is_closed
    assert [m.content for m in saver.session.history] == [m.content for m in asked]
    assert saver.session.engine.context_size == 128
    assert ask(saver, "he").reused_tokens == 0
    assert saver.store.latest().model == "second"


def test_the_statistics_of_both_are_saved(start, home):
    saver, models = start()
    ask(saver)
    models.change("second")
    assert (home / "stats" / "first.json").exists()
    ask(saver)
    save_report(saver.session, saver.model)
    assert (home / "stats" / "second.json").exists()


@pytest.mark.parametrize(
    "fault", [ResourceError("no room"), MemoryError(), KeyboardInterrupt(), OSError(errno.EIO, "x")]
)
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(start, loads, fault):
    saver, models = start()
    ask(saver)
    seed, ids = saver.session.sampling.seed, saver.session.history[1].ids
    loads.failing["second"] = fault
    with pytest.raises(type(fault)):
        models.change("second")
    assert loads.names == ["first", "second", "first"]
    assert loads.open_then == [0, 0, 0]
    assert loads.left_over == []  # the error held what was half loaded
    assert saver.model == "first"
    assert saver.session.history[1].ids == ids
    assert saver.session.sampling.seed == seed
    assert ask(saver, "he").generated_tokens == 3


def test_where_neither_can_be_loaded_the_error_names_both(start, loads):
    saver, models = start()
    loads.failing |= {"second": ResourceError("no room"), "first": ResourceError("none either")}
    with pytest.raises(MixchatError, match="no room; nor can first be loaded again: none either"):
        models.change("second")
    assert saver.session.engine.is_closed
    with CacheSaver(saver.session, FileBesideChat(saver, create=True)):
        pass  # there is nothing to save
    save_report(saver.session, saver.model)


@pytest.mark.parametrize(
    ("name", "load", "error"),
    [
        ("third", LOAD, "there is no model 'third'"),
        ("instruct", LOAD, "not on this machine"),
        ("", LOAD, "the model's name is empty"),
        ("first", LOAD, "this chat already has the model first"),
        ("damaged", LOAD, "experts-001.safetensors"),
        ("second", LoadOptions(device="cpu", trace="trace"), "--trace records the routing of one"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_closed(start, loads, home, name, load, error):
    saver, models = start()
    models = ModelChanger(saver, load, models._open, models._hooks)
    damaged = home / "models" / "damaged"
    damaged.mkdir()
    for file in (home / "models" / "second").iterdir():
        if file.name != "experts-001.safetensors":
            (damaged / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MixchatError, match=error):
        models.check(name)
    assert loads.names == ["first"]
    assert ask(saver).generated_tokens == 3


def test_a_context_that_the_other_model_cannot_have_is_said_before(start):
    load = LoadOptions(device="cpu", context_size=120)
    saver, models = start(LoadOptions(device="cpu", context_size=90))
    models.change("second")
    models = ModelChanger(saver, load, models._open, models._hooks)
    with pytest.raises(MixchatError, match="120"):
        models.check("first")


def test_a_tokenizer_that_cannot_be_read_is_said_before(start, home):
    saver, models = start()
    odd = home / "models" / "odd"
    odd.mkdir()
    for file in (home / "models" / "second").iterdir():
        data = b"{" if file.name == "tokenizer.json" else file.read_bytes()
        (odd / file.name).write_bytes(data)
    with pytest.raises(MixchatError, match=r"tokenizer\.json"):
        models.check("odd")
    assert not saver.session.engine.is_closed


def test_others_are_those_with_another_directory(start, home):
    saver, models = start()
    assert models.others() == ["second"]
    saver.model = str(home / "models" / "second")
    assert models.others() == ["first"]
    saver.model = "gone"
    assert models.others() == ["first", "second"]


@pytest.mark.parametrize("beside", [True, False])
def test_the_kv_cache_comes_back_with_the_model_that_stays(start, loads, tmp_path, beside):
    saver, models = start()
    place = FileBesideChat(saver, create=True) if beside else NamedFile(tmp_path / "cache")
    loads.failing["second"] = ResourceError("no room")
    with CacheSaver(saver.session, place) as cache:
        ask(saver)
        with pytest.raises(ResourceError), cache.changing_model():
            models.change("second")
        assert ask(saver, "he").reused_tokens == 3


def test_the_kv_cache_of_the_new_model_is_saved_in_place_of_the_old_one_s(start, capsys):
    saver, models = start()
    with CacheSaver(saver.session, FileBesideChat(saver, create=True)) as cache:
        ask(saver)
        with cache.changing_model():
            models.change("second")
        ask(saver, "he")
    with CacheSaver(saver.session, FileBesideChat(saver, create=True)):
        assert ask(saver, "ll").reused_tokens > 6
    assert capsys.readouterr().err == ""


def test_a_chat_types_it(start, reports):
    saver, models = start()
    chat = Chat(
        saver.session, "hell\r/model second\rhe\r/model\r" + CTRL_D, models=lambda _: models
    )
    assert chat.errors == []
    assert len(reports["second"]) == 1
    assert "(the model is second from here on)" in chat.text
    assert saver.model == "second"
