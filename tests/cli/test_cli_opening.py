"""Every flag of `mixchat run` arrives where it belongs, and so does what was saved."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_doubles import ScriptedEngine
from chat_files import chat_of

from mixchat.base.quantities import MemoryBudget
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.engine import prompt_cache
from mixchat.text.messages import Message


@pytest.fixture
def seen(monkeypatch):
    """What a session is opened with. A conversation has 100 tokens for each message."""
    seen = {}

    class Stop(Exception):
        pass

    class Config:
        eos_token_ids = (2,)

    class Text:
        def __init__(self, directory):
            seen["text"] = directory

        def tokenizer(self):
            return None

        def template(self, eos_token_ids):
            assert eos_token_ids == Config.eos_token_ids
            return SimpleNamespace(encode=lambda messages: [5] * 100 * len(messages), stop_ids=())

    def build_engine(installed, options, note):
        seen["directory"], seen["load"] = installed.directory, options
        return ScriptedEngine()

    def session(model, options, form, tools):
        seen["session"] = options
        model.close()
        raise Stop

    monkeypatch.setattr("mixchat.loading.loader.build_engine", build_engine)
    monkeypatch.setattr("mixchat.text.checkpoint_text.CheckpointText", Text)
    monkeypatch.setattr("mixchat.chat.session.ChatSession", session)
    return seen


def test_flags_reach_the_engine_and_the_session(mixchat, seen, tiny_model):
    flags = (
        *("--ctx-size", "77", "--host-memory", "50%", "--device", "cpu", "-s", "Be brief."),
        *("--temp", "0.3", "--top-p", "0.4", "--top-k", "5", "--min-p", "0.06"),
        *("--repeat-penalty", "1.7", "--seed", "8", "-n", "9", "--stop", "x", "--stop", "y"),
    )
    mixchat("run", "-m", str(tiny_model), "Hi", *flags, fake=False)
    load, options = seen["load"], seen["session"]
    assert Path(seen["directory"]) == Path(seen["text"]) == tiny_model
    assert (load.context_size, load.device) == (77, "cpu")
    assert load.host_memory == MemoryBudget(fraction=0.5)
    assert options.sampling == {
        **{"temperature": 0.3, "top_p": 0.4, "top_k": 5},
        **{"min_p": 0.06, "repeat_penalty": 1.7, "seed": 8},
    }
    assert (options.system, options.max_tokens) == ("Be brief.", 9)
    assert options.stop == ("x", "y")


def test_a_saved_conversation_asks_for_a_context_that_holds_it(
    mixchat, seen, tiny_model, environment, monkeypatch
):
    """A context by free memory could be smaller than the one in which a chat was saved."""
    with monkeypatch.context() as patch:
        patch.setenv("MIXCHAT_HOME", environment["MIXCHAT_HOME"])
        talk = (Message("user", "Hi"), Message("assistant", "Hello")) * 50
        ChatStore().save(chat_of(messages=talk, name="long", model=str(tiny_model)))
    run = ("run", "-m", str(tiny_model), "Go on", "--device", "cpu")
    mixchat(*run, "--resume", "long", fake=False)
    assert seen["load"].least_context == 100 * 100 + 2048
    mixchat(*run, "--resume", "long", "--overflow", "drop-oldest", fake=False)
    assert seen["load"].least_context == 0
    mixchat(*run, fake=False)
    assert seen["load"].least_context == 0


def test_a_prompt_cache_asks_for_a_context_that_holds_it(
    mixchat, seen, tiny_model, tmp_path, monkeypatch
):
    path = tmp_path / "manual.cache"
    tokens = {path: 20_000}
    monkeypatch.setattr(prompt_cache, "saved_tokens", lambda path: tokens.get(path, 0))
    run = ("run", "-m", str(tiny_model), "Hi", "--device", "cpu")
    mixchat(*run, "--prompt-cache", str(path), fake=False)
    assert seen["load"].least_context == 20_000 + 2048


@pytest.mark.parametrize(("named", "used"), [((), None), (("demo",), "tiny")])
def test_the_only_model_or_the_one_used_last_is_the_default_of_every_command(
    mixchat, monkeypatch, tiny_model, tmp_path, named, used
):
    """A chat asked for 93 GB, although the demo was installed."""
    for name in ("tiny", *named):
        shutil.copytree(tiny_model, tmp_path / "home" / "models" / name)
    if used is not None:
        report = tmp_path / "home" / "stats" / f"{used}.json"
        report.parent.mkdir()
        report.touch()
    served = []
    for function in ("serve_http", "serve_experts"):
        monkeypatch.setattr(f"mixchat.cli.serve.{function}", lambda name, *_: served.append(name))
    expected = "tiny"
    assert expected in mixchat("stats", fake=False).stderr.decode()
    assert json.loads(mixchat("run", "--json", "Hi").stdout)["model"] == expected
    assert mixchat("serve", fake=False).returncode == 0
    assert mixchat("worker", fake=False).returncode == 0
    assert served == [expected] * 2
    settings = json.loads(mixchat("config", "--json").stdout)["settings"]
    assert settings["model"] == {"value": expected, "from": "default"}
    assert (
        json.loads(mixchat("run", "--json", "Hi", MIXCHAT_MODEL="mine").stdout)["model"] == "mine"
    )


def test_of_several_models_that_have_not_run_one_has_to_be_named(mixchat, tiny_model, tmp_path):
    for name in ("tiny", "demo"):
        shutil.copytree(tiny_model, tmp_path / "home" / "models" / name)
    for command, hint in (
        (("run", "Hi"), "Say which: -m demo or -m tiny."),
        (("serve",), "Say which: -m demo or -m tiny."),
        (("worker",), "Say which: -m demo or -m tiny."),
        (("bench",), "Say which: demo or tiny."),
        (("stats",), "Say which: demo or tiny."),
    ):
        done = mixchat(*command, fake=False)
        assert done.returncode == 2, command
        assert hint in " ".join(done.stderr.decode().split())


def test_what_needs_no_default_model_does_not_ask_for_one(
    mixchat, tiny_model, tmp_path, environment, monkeypatch
):
    for name in ("tiny", "demo"):
        shutil.copytree(tiny_model, tmp_path / "home" / "models" / name)
    with monkeypatch.context() as patch:
        patch.setenv("MIXCHAT_HOME", environment["MIXCHAT_HOME"])
        ChatStore().save(chat_of(name="old", model="tiny"))
    for command in (("run", "--help"), ("serve", "--help"), ("config",)):
        assert mixchat(*command).returncode == 0
    settings = json.loads(mixchat("config", "--json").stdout)["settings"]
    assert settings["model"] == {"value": None, "from": "default"}
    assert mixchat("worker", "--new-key", fake=False).returncode == 0
    unreachable = mixchat("run", "--server", "127.0.0.1:1", "Hi", fake=False)
    assert "Say which" not in unreachable.stderr.decode()
    assert unreachable.returncode == 5
    resumed = mixchat("run", "--json", "--resume", "old", "Hi")
    assert json.loads(resumed.stdout)["model"] == "tiny"
    assert json.loads(mixchat("run", "--json", "Hi").stdout)["model"] == "tiny"
