"""A session yields an answer's text as events and remembers exactly what was shown."""

from contextlib import closing
from dataclasses import replace

import pytest
from chat_doubles import (
    CharacterTokenizer,
    PlainTemplate,
    ScriptedEngine,
    ScriptedModel,
    what_was_asked,
)

from mixchat.base.errors import PromptError
from mixchat.base.options import ChatOptions
from mixchat.chat.session import ChatSession
from mixchat.face.events import End, LeftOut, Piece, Reading
from mixchat.face.model import ModelText
from mixchat.text.messages import Message


def listen(events):
    """The text of all events, and the last event."""
    text = ""
    for event in events:
        if isinstance(event, End):
            return text, event
        if isinstance(event, Piece):
            text += event.text
    raise AssertionError("no End event")


def prompt_of(session, turn):
    return "".join(map(chr, session.engine.prompts[turn]))


def test_an_answer_comes_in_pieces_and_ends_with_why(session_of):
    session = session_of("Hello")
    events = list(session.ask("Hi"))
    assert events[0] == Reading(0, len("[user]Hi"))
    assert [event.text for event in events[1:-1]] == list("Hello")
    assert events[-1].reason == "stop"
    assert events[-1].stats.generated_tokens == 6
    assert not session.history[-1].partial


def test_the_next_turn_is_built_from_the_generated_ids(session_of):
    session = session_of("Hello", "Fine", "b", system="Be brief")
    turns_of(session, "Hi", "How are you?")
    assert prompt_of(session, 1) == "[system]Be brief[user]Hi[assistant]Hello[user]How are you?"
    assert session.history[1].ids == tuple(map(ord, "Hello"))
    session.clear()
    turns_of(session, "Hi again")
    assert prompt_of(session, 2) == "[system]Be brief[user]Hi again"


def test_an_answer_is_a_quarter_of_the_context_long_by_default(session_of):
    """Three of ten first questions to a small model never ended before the context was full."""
    session = session_of("Hello, and on and on" * 5, context_size=80)
    text, finished = listen(session.ask("Hi"))
    assert (text, finished.reason) == (("Hello, and on and on" * 5)[:20], "length")
    assert session.history[-1].partial  # so /continue continues


def test_the_length_that_the_models_makers_advise_goes_before_the_default(session_of):
    session = session_of("Hello", "Hello", "Hello", context_size=80, advised_tokens=4)
    assert listen(session.ask("Hi"))[0] == "Hell"
    session.max_tokens = 2
    assert listen(session.ask("Hi"))[0] == "He"
    session.max_tokens = 0  # what fits
    assert listen(session.ask("Hi"))[0] == "Hello"


@pytest.mark.parametrize("max_tokens", [0, 100])
def test_a_full_context_says_so(session_of, max_tokens):
    session = session_of("Hello", context_size=len("[user]Hi") + 2, max_tokens=max_tokens)
    text, finished = listen(session.ask("Hi"))
    assert (text, finished.reason) == ("He", "context")


@pytest.mark.parametrize(
    ("script", "said", "reason"),
    [
        ("One.END two", "One.", "stop_string"),
        ("END of it", "", "stop_string"),
        ("A\nEN", "A\nEN", "stop"),
        ([*"ABE", KeyboardInterrupt()], "AB", "interrupted"),
    ],
)
def test_a_stop_string_is_neither_shown_nor_remembered(session_of, script, said, reason):
    """An answer that began with it was not remembered, and scripts printed the one before."""
    session = session_of(script, "x", stop=["END"])
    text, finished = listen(session.ask("Count"))
    assert (text, finished.reason, session.engine.closed) == (said, reason, 1)
    assert session.history[-1].partial == (reason == "interrupted")
    turns_of(session, "On")
    assert prompt_of(session, 1) == f"[user]Count[assistant]{said}[user]On"
    assert session.history[1].ids == (tuple(map(ord, said)) or None)


@pytest.mark.parametrize("way", ["interrupt", "close", "KeyboardInterrupt"])
def test_an_interrupted_answer_is_remembered_as_far_as_it_was_shown(session_of, way):
    script = [*"Hel", KeyboardInterrupt()] if way == "KeyboardInterrupt" else "Hello"
    session = session_of(script, "Fine")
    events = session.ask("Hi")
    with closing(events):
        next(events)  # the progress of the prompt
        shown = next(events).text + next(events).text
        if way == "interrupt":
            session.interrupt()
        if way != "close":
            rest, finished = listen(events)
            shown += rest
            assert finished.reason == "interrupted"
    assert session.engine.closed == 1
    assert listen(session.ask("Go on"))[0] == "Fine"
    assert prompt_of(session, 1) == f"[user]Hi[assistant]{shown}[user]Go on"


@pytest.mark.parametrize("failure", [PromptError("too long"), RuntimeError("broken")])
@pytest.mark.parametrize("said", ["", "Hel"])
def test_a_failing_turn_leaves_no_trace(session_of, failure, said):
    session = session_of("Hello", [*said, failure], "Fine")
    listen(session.ask("Hi"))
    before = list(session.history)
    with pytest.raises(type(failure)):
        list(session.ask("What?"))
    assert session.history == before
    assert listen(session.ask("Again"))[0] == "Fine"


def test_a_question_asked_again_gets_another_seed_and_a_new_session_the_same(session_of):
    def seeds():
        session = session_of("a", "b", sampling={"seed": 7})
        ends = [listen(session.ask("Hi"))[1] for _ in range(2)]
        assert [end.seed for end in ends] == [s.seed for s in session.engine.samplings]
        return [end.seed for end in ends]

    assert seeds() == seeds() == [7, 8]


class SpacelessTokenizer(CharacterTokenizer):
    """Shows no leading space, as SentencePiece does."""

    token_bytes = replace(CharacterTokenizer.token_bytes, first={ord(" "): b""})


@pytest.mark.parametrize(("continues", "text"), [(True, " world"), (False, "world")])
def test_a_completion_keeps_the_space_that_it_continues_with(continues, text):
    template = PlainTemplate(continues_prompt=continues)
    engine = ScriptedEngine(" world")
    model = ScriptedModel(engine, ModelText(SpacelessTokenizer(), template))
    session = ChatSession(model, ChatOptions())
    assert listen(session.ask("Hello"))[0] == text


def turns_of(session, *questions):
    for question in questions:
        listen(session.ask(question))


@pytest.mark.parametrize("way", ["ask_again", "continue_answer"])
def test_without_an_answer_there_is_nothing_to_do_again(session_of, way):
    session = session_of()
    with pytest.raises(PromptError, match="nothing has been answered yet"):
        getattr(session, way)()
    with pytest.raises(PromptError, match="nothing has been answered yet"):
        session.ask_instead("x")


def test_redo_restores_what_each_undo_removed_the_last_one_first(session_of):
    session = session_of("a", "b", "c")
    turns_of(session, "one", "two", "three")
    before = list(session.history)
    session.undo()
    session.undo(2)
    assert session.redo() == 2
    assert session.history == before[:4]
    assert session.redo() == 1
    assert session.history == before
    assert session.redo() == 0


def test_redo_restores_nothing_of_before_the_last_answer_or_of_another_chat(session_of):
    session = session_of("a", "b", context_size=60)
    turns_of(session, "one")
    session.undo()
    with pytest.raises(PromptError, match="too long"):
        listen(session.ask("x" * 70))
    assert session.redo() == 1  # a question without an answer changes nothing
    session.undo()
    turns_of(session, "two")
    assert session.redo() == 0
    session.undo()
    session.clear()
    assert session.redo() == 0


def test_turns_that_are_restored_after_a_change_of_model_have_none_of_its_ids(session_of):
    session, other = session_of("a", "b"), session_of("c")
    other.engine.identity = "another"
    turns_of(session, "one")
    session.undo()
    session.take_model(other)
    session.redo()
    restored = [(message.content, message.ids) for message in session.history]
    assert restored == [("one", None), ("a", None)]


def answers_under(session, count):
    """Ask `count` questions; for each which turns were left out, and the prompt."""
    seen = []
    for number in range(count):
        left_out = 0
        for event in session.ask(f"question {number}"):
            if isinstance(event, LeftOut):
                # The messages were those of the last question's cut, and the turns all.
                assert event.messages == 2 * event.turns
                left_out = event.turns
        seen.append((left_out, prompt_of(session, number)))
    return seen


def test_old_turns_are_left_out_whole_when_the_context_is_full(session_of):
    script = [f"answer {number}" for number in range(12)]
    session = session_of(*script, system="Be brief", context_size=200, overflow="drop-oldest")
    seen = answers_under(session, 12)
    for number, (left_out, prompt) in enumerate(seen):
        assert len(prompt) < 200
        assert prompt.startswith("[system]Be brief[user]question")
        assert prompt.endswith(f"[user]question {number}")
        if left_out:
            assert prompt.startswith(f"[system]Be brief[user]question {left_out}[assistant]")
            assert len(prompt) <= 150  # so that there is room for the turns to come
    dropped = [left_out for left_out, _ in seen if left_out]
    assert len(dropped) > 1
    assert dropped == sorted(set(dropped))  # said whenever it grows, and only then
    assert len(session.history) == 24  # what is left out of the prompt stays
    assert session.used_tokens < 200


def test_a_chat_far_longer_than_the_context_can_be_resumed(session_of, monkeypatch):
    """Its whole past went to the tokenizer first, which takes no more than 2 MB."""
    session = session_of("fine", context_size=400, overflow="drop-oldest")
    turn = [Message("user", "hi"), Message("assistant", "a" * 100, tuple(b"a" * 100))]
    session.restore(turn * 1000)
    encode, encoded = session.model.template.encode, []
    monkeypatch.setattr(
        session.model.template,
        "encode",
        lambda given, *more: encoded.append(len(given)) or encode(given),
    )
    assert session.used_tokens > 400
    *_, finished = session.ask("and now?")
    assert finished.reason == "stop"
    assert max(encoded) < 12
    session.overflow = "stop"
    session.restore(turn * 1000)
    with pytest.raises(PromptError, match="too long"):
        listen(session.ask("and now?"))
    assert len(session.history) == 2000


def test_turns_are_left_out_while_there_is_room_for_a_short_answer_only(session_of):
    """An answer was cut off after a few tokens, although the oldest turn could have gone."""
    session = session_of("a" * 50, "b" * 30, context_size=120, overflow="drop-oldest", max_tokens=0)
    turns_of(session, "x" * 30)
    *_, finished = session.ask("again")
    assert prompt_of(session, 1) == "[user]again"
    assert finished.reason == "stop"


def test_an_answer_is_remembered_if_the_program_has_to_end(session_of):
    session = session_of(["a", "b", SystemExit(143)])
    with pytest.raises(SystemExit):
        listen(session.ask("Hi"))
    assert session.history[-1].content == "ab"
    assert session.history[-1].partial


def test_a_restored_chat_continues_with_its_seeds(session_of):
    """/regen after a resume gave the same answer again."""
    session = session_of("a", "b", sampling={"seed": 5})
    turns_of(session, "one", "two")
    other = session_of("c", sampling={"seed": 5})
    other.restore(session.history)
    assert listen(other.ask_again())[1].seed == 7


def test_a_question_too_long_by_itself_leaves_nothing_out(session_of):
    session = session_of("a", "b", context_size=60, overflow="drop-oldest")
    turns_of(session, "one")
    with pytest.raises(PromptError, match="too long"):
        listen(session.ask("x" * 70))
    turns_of(session, "two")
    assert prompt_of(session, 1) == "[user]one[assistant]a[user]two"


def test_undo_brings_back_what_had_been_left_out(session_of):
    script = [f"answer {number}" for number in range(9)]
    session = session_of(*script, context_size=200, overflow="drop-oldest")
    assert any(left_out for left_out, _ in answers_under(session, 8))
    session.undo(7)
    turns_of(session, "again")
    assert prompt_of(session, 8) == "[user]question 0[assistant]answer 0[user]again"


def test_a_question_that_cannot_fit_is_refused_before_it_is_made_into_tokens(session_of):
    """A paste of megabytes took a tokenizer a gigabyte, to say that it is too long."""
    session = session_of(context_size=10)
    with pytest.raises(PromptError, match=r"the question is too long: more than 1\.28 kB"):
        listen(session.ask("x" * 1281))
    assert session.history == []


def test_leaving_out_old_turns_is_offered_only_if_it_helps(session_of):
    """A first question got the hint /set overflow drop-oldest, with no turn that could go."""
    session, hints = session_of("a" * 20, context_size=60), []
    for question in ("x" * 70, "one", "x" * 40, "x" * 70):
        try:
            listen(session.ask(question))
        except PromptError as error:
            hints.append("drop-oldest" in error.hint)
    assert hints == [False, True, False]
    assert len(session.history) == 2


def asked_of(session):
    return [request.constraint.asked for request in session.engine.requests]


def test_each_answer_of_a_form_has_a_constraint_from_its_start_or_prompt(session_of):
    session = session_of("abcd", "ef", "gh", form=what_was_asked, max_tokens=2)
    listen(session.ask("Hi"))
    listen(session.continue_answer())
    listen(session.ask_again())
    begun = [ord("a"), ord("b")]
    assert asked_of(session) == [([], False, 2), (begun, False, 2), ([], False, 2)]
    completing = session_of("abcd", form=what_was_asked, continues_prompt=True, max_tokens=3)
    listen(completing.ask("Hi"))
    assert asked_of(completing) == [([], True, 3)]
