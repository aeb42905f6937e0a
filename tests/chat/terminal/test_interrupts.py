"""A turn after an interrupted one is exactly what it would be in a run of its own."""

import itertools
import os
import random
import signal
from contextlib import closing

import pytest
from chat_doubles import CharacterTokenizer, TinyTemplate

from mixchat.base.options import ChatOptions, SamplingOptions
from mixchat.chat.session import ChatSession
from mixchat.face.model import Model, ModelText
from mixchat.text.messages import Message

GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def exact_model(tiny_checkpoint, install):
    """In fp32. If a prompt is read in other pieces, rounding changes next to nothing."""
    return install(tiny_checkpoint, quant_type="none")


@pytest.fixture
def open_engine(exact_model):
    from mixchat.base.options import LoadOptions
    from mixchat.loading.loader import load_engine

    return lambda: load_engine(exact_model, LoadOptions(device="cpu", context_size=128))


@pytest.fixture
def logits(monkeypatch):
    """The logits from which each token was chosen."""
    from mixchat.engine.sampling import Sampler

    seen, sample = [], Sampler.sample

    def recorded(self, logits, history):
        seen.append(logits.clone())
        return sample(self, logits, history)

    monkeypatch.setattr(Sampler, "sample", recorded)
    return seen


@pytest.fixture
def session_with(open_engine):
    models = []

    def opened(**options):
        text = ModelText(CharacterTokenizer(), TinyTemplate(), GREEDY)
        models.append(Model("tiny", open_engine, text))
        return ChatSession(models[-1], ChatOptions(**options))

    yield opened
    for model in models:
        model.close()


def assert_as_in_a_run_of_its_own(session, open_engine, logits):
    """Ask; a new engine that is given the same prompt has the same logits at every token."""
    before = session.history
    prompt = session.model.template.encode([*before, Message("user", "next")])
    session.model.do(lambda engine: logits.clear())
    list(session.ask("next"))
    here = list(logits)
    logits.clear()
    fresh = open_engine().generate(prompt, sampling=GREEDY, stop_ids={2}, max_tokens=6)
    ids = list(fresh)
    assert len(here) == len(ids)
    for one, other in zip(here, logits, strict=True):
        assert (one - other).abs().max() < 1e-4
    session.restore(before)


@pytest.mark.parametrize("seed", range(4))
def test_after_an_answer_was_stopped_anywhere_the_next_turn_is_exact(
    session_with, open_engine, logits, seed
):
    chance = random.Random(seed)
    session = session_with(max_tokens=6)
    for number in range(6):
        session.max_tokens = 12
        with closing(session.ask(f"question {number}")) as events:
            for _ in itertools.islice(events, chance.randrange(1, 8)):
                if chance.random() < 0.3:
                    session.interrupt()
        session.max_tokens = 6
        assert_as_in_a_run_of_its_own(session, open_engine, logits)
        if len(session.history) > 8:
            session.undo(chance.randrange(1, 3))


@pytest.mark.parametrize("layer", [0, 1])
def test_after_ctrl_c_in_a_layer_the_next_turn_is_exact(session_with, open_engine, logits, layer):
    session = session_with(max_tokens=6)
    list(session.ask("first"))
    engine = session.engine
    cache, calls = engine.held()[1].layers[layer], itertools.count()
    attend = cache.attend

    def interrupted(*arguments):
        seen = attend(*arguments)
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return seen

    cache.attend = interrupted
    *_, end = session.ask("a longer second question")
    assert end.reason == "interrupted"
    assert len(session.history) == 2
    assert_as_in_a_run_of_its_own(session, open_engine, logits)


def test_a_continued_answer_is_the_one_that_was_not_stopped(session_with):
    whole = session_with(max_tokens=24)
    list(whole.ask("tell me"))
    pieces = session_with(max_tokens=8)
    list(pieces.ask("tell me"))
    while len(pieces.history[-1].ids) < len(whole.history[-1].ids):
        list(pieces.continue_answer())
    assert pieces.history[-1].ids == whole.history[-1].ids
    assert pieces.history[-1].content == whole.history[-1].content
