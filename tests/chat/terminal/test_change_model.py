"""`/model NAME` continues the conversation with another model."""

import pytest
from chat_doubles import make_session
from chat_typing import CTRL_D, Chat, OneModel, prompts_of

from mixchat.base.errors import CheckpointError, MixchatError
from mixchat.base.options import SamplingOptions
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.face.reading_time import ReadingTime


class Models(OneModel):
    """The models `small`, whose engine says what it is told to, and `broken`."""

    def __init__(self, saver, *script, after_turn=lambda finished: None, **options):
        self.saver, self.after_turn = saver, after_turn
        self.other = make_session(*script, **options)
        self.other.engine.identity = "another"

    def others(self, current):
        return ["broken", "small"]

    def check(self, name, current):
        if name not in self.others(current):
            super().check(name, current)

    def change(self, name):
        if name == "broken":
            raise CheckpointError("broken is damaged")
        self.saver.session.take_model(self.other)
        self.saver.model = name
        return self.after_turn, ReadingTime()


def typed(session, *lines, store=None, models=lambda saver: Models(saver, "Two")):
    return Chat(
        session, "".join(f"{line}\r" for line in lines) + CTRL_D, store=store, models=models
    )


def said(chat):
    return [line for line in chat.text.splitlines() if line]


def test_the_conversation_continues_with_the_other_model(session_of):
    session = session_of("One")
    first = session.engine
    chat = typed(session, "Hi", "/model small", "And you?")
    assert said(chat) == ["One", "(the model is small from here on)", "Two"]
    assert len(first.prompts) == 1
    assert prompts_of(session) == ["[user]Hi[assistant]One[user]And you?"]
    assert session.history[1].ids is None  # they mean something else to another tokenizer
    assert session.history[3].ids is not None


def test_model_alone_says_which_it_is_and_which_there_are(session_of):
    assert typed(session_of(), "/model").text == "demo (also on this machine: broken, small)\n"
    alone = typed(session_of(), "/model", models=lambda saver: OneModel())
    assert alone.text == "demo (there is no other one here)\n"


@pytest.mark.parametrize(
    ("name", "error"), [("broken", "broken is damaged"), ("none", "there is no model 'none'")]
)
def test_a_model_that_cannot_be_had_leaves_the_old_one(session_of, name, error):
    session = session_of("One", "Again")
    chat = typed(session, "Hi", f"/model {name}", "And?")
    assert said(chat) == ["One", "Again"]
    assert list(map(str, chat.errors)) == [error]
    assert chat.saver.model == "demo"
    assert session.history[1].ids is not None


def test_the_saved_chat_notes_the_model_at_once(session_of, tmp_path):
    store = ChatStore(tmp_path)
    typed(session_of(), "/model small", store=store)
    assert store.all() == []  # there is nothing to save yet
    typed(session_of("One"), "Hi", "/model small", store=store)
    chat = store.load("last")
    assert (chat.model, chat.identity) == ("small", "another")


def test_figures_after_an_answer_are_the_new_models(session_of):
    before, after = [], []
    session = session_of("One")
    Chat(
        session,
        "Hi\r/model small\rAnd?\r" + CTRL_D,
        after_turn=before.append,
        models=lambda saver: Models(saver, "Two", after_turn=after.append),
    )
    assert (len(before), len(after)) == (1, 1)


def test_a_context_that_is_full_with_the_new_model_is_said(session_of):
    chat = typed(
        session_of("One" * 30),
        "Hi",
        "/model small",
        models=lambda saver: Models(saver, context_size=120),
    )
    assert "tokens of the context are used: /clear starts a new chat" in chat.text


@pytest.mark.parametrize("step", ["check", "change"])
def test_ctrl_c_while_it_loads_leaves_the_old_one(session_of, step):
    class Interrupted(Models):
        def __init__(self, saver):
            super().__init__(saver)
            setattr(self, step, self.interrupt)

        def interrupt(self, *names):
            raise KeyboardInterrupt

    session = session_of("One")
    chat = typed(session, "/model small", "Hi", models=Interrupted)
    assert said(chat) == ["(stopped; the model is still demo)", "One"]


def test_the_chat_ends_if_no_model_is_left(session_of):
    class Lost(Models):
        def change(self, name):
            self.saver.session.engine.close()
            raise MixchatError("neither can be loaded")

    with pytest.raises(MixchatError, match="neither"):
        typed(session_of("One"), "/model small", "Hi", models=Lost)


def test_what_was_changed_of_the_sampling_stays_and_all_else_is_advised(session_of):
    session = session_of(advised=SamplingOptions(temperature=0.5, top_p=0.9), sampling={"seed": 1})
    session.changed["top_p"] = 0.8
    session.system, session.max_tokens, session.stop = "Be brief.", 7, ("x",)
    advised = SamplingOptions(temperature=0.2, top_p=0.7)
    session.take_model(session_of(advised=advised, sampling={"seed": 2}))
    assert session.sampling == {"seed": 1, "top_p": 0.8}
    assert session.model.sampling == advised
    assert (session.system, session.max_tokens, session.stop) == ("Be brief.", 7, ("x",))


def test_a_model_that_comes_back_keeps_the_token_ids(session_of):
    session = session_of("One")
    list(session.ask("Hi"))
    session.take_model(session_of("Two"))
    assert session.history[1].ids is not None
