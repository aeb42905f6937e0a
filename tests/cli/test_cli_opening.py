"""Every flag of `mixchat run` arrives where it belongs; an old demo is noticed."""

from pathlib import Path

from mixchat.base.quantities import MemoryBudget


def test_flags_reach_the_engine_and_the_session(mixchat, monkeypatch, tiny_model):
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

    class Engine:
        config = Config()

    def build_engine(installed, options, note):
        seen["directory"], seen["load"] = installed.directory, options
        return Engine()

    def session(backend, sampling, options):
        seen["session"] = sampling, options
        raise Stop

    monkeypatch.setattr("mixchat.loading.loader.build_engine", build_engine)
    monkeypatch.setattr("mixchat.text.checkpoint_text.CheckpointText", Text)
    monkeypatch.setattr("mixchat.chat.session.ChatSession", session)
    flags = (
        *("--ctx-size", "77", "--host-memory", "50%", "--device", "cpu", "-s", "Be brief."),
        *("--temp", "0.3", "--top-p", "0.4", "--top-k", "5", "--min-p", "0.06"),
        *("--repeat-penalty", "1.7", "--seed", "8", "-n", "9", "--stop", "x", "--stop", "y"),
    )
    mixchat("run", "-m", str(tiny_model), "Hi", *flags, fake=False)
    load, (sampling, options) = seen["load"], seen["session"]
    assert Path(seen["directory"]) == Path(seen["text"]) == tiny_model
    assert (load.context_size, load.device) == (77, "cpu")
    assert load.host_memory == MemoryBudget(fraction=0.5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.4, 5)
    assert (sampling.min_p, sampling.repeat_penalty, sampling.seed) == (0.06, 1.7, 8)
    assert (options.system, options.max_tokens) == ("Be brief.", 9)
    assert options.stop == ["x", "y"]
