"""A session yields an answer's text as events and remembers exactly what was shown."""

from contextlib import closing

import pytest
from chat_doubles import CharacterTokenizer, PlainTemplate, SamplingOptions, ScriptedEngine

from mixchat.chat.session import ChatSession, Finished, TextDelta
from mixchat.errors import PromptError


def listen(events):
    """The text of all events, and the last event."""
    text = ""
    for event in events:
        if isinstance(event, Finished):
            return text, event
        text += event.text
    raise AssertionError("no Finished event")


def prompt_of(session, turn):
    return "".join(map(chr, session.engine.prompts[turn]))


def test_an_answer_comes_in_pieces_and_ends_with_why(session_of):
    session = session_of("Hello")
    events = list(session.ask("Hi"))
    assert [event.text for event in events[:-1]] == list("Hello")
    assert events[-1].reason == "stop"
    assert events[-1].stats.generated_tokens == 6


def test_the_stats_of_a_turn_do_not_change_afterwards(session_of):
    session = session_of("Hello", "Longer than that")
    _, first = listen(session.ask("Hi"))
    listen(session.ask("And?"))
    assert first.stats.generated_tokens == 6


def test_the_next_turn_is_built_from_the_generated_ids(session_of):
    session = session_of("Hello", "Fine")
    listen(session.ask("Hi"))
    listen(session.ask("How are you?"))
    assert prompt_of(session, 1) == "[user]Hi[assistant]Hello[user]How are you?"
    assert session.messages[1].ids == tuple(map(ord, "Hello"))


def test_the_system_prompt_comes_first_and_outlives_clear(session_of):
    session = session_of("a", "b", system="Be brief")
    listen(session.ask("Hi"))
    session.clear()
    listen(session.ask("Hi again"))
    assert prompt_of(session, 1) == "[system]Be brief[user]Hi again"


def test_max_tokens_ends_with_length(session_of):
    session = session_of("Hello", max_tokens=3)
    text, finished = listen(session.ask("Hi"))
    assert (text, finished.reason) == ("Hel", "length")
    assert session.messages[-1].ids == tuple(map(ord, "Hel"))


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_a_full_context_says_so(session_of, max_tokens):
    session = session_of("Hello", context_size=len("[user]Hi") + 2, max_tokens=max_tokens)
    text, finished = listen(session.ask("Hi"))
    assert (text, finished.reason) == ("He", "context")


def test_a_stop_string_is_not_shown_nor_remembered(session_of):
    session = session_of("One.\n\nTwo.", "x", stop=["\n\n"])
    text, finished = listen(session.ask("Count"))
    assert (text, finished.reason) == ("One.", "stop_string")
    assert session.engine.closed == 1
    listen(session.ask("On"))
    assert prompt_of(session, 1) == "[user]Count[assistant]One.[user]On"
    assert session.messages[1].ids == tuple(map(ord, "One."))


def test_the_beginning_of_a_stop_string_is_shown_when_the_answer_ends(session_of):
    session = session_of("A\n", stop=["\n\n"])
    text, finished = listen(session.ask("x"))
    assert (text, finished.reason) == ("A\n", "stop")


@pytest.mark.parametrize("way", ["interrupt", "close", "KeyboardInterrupt"])
def test_an_interrupted_answer_is_remembered_as_far_as_it_was_shown(session_of, way):
    script = [*"Hel", KeyboardInterrupt()] if way == "KeyboardInterrupt" else "Hello"
    session = session_of(script, "Fine")
    events = session.ask("Hi")
    with closing(events):
        shown = next(events).text + next(events).text
        if way == "interrupt":
            session.interrupt()
        if way != "close":
            rest, finished = listen(events)
            shown += rest
            assert finished.reason == "interrupted"
    assert session.engine.closed == 1
    listen(session.ask("Go on"))
    assert prompt_of(session, 1) == f"[user]Hi[assistant]{shown}[user]Go on"


def test_an_interrupt_does_not_outlive_its_turn(session_of):
    session = session_of("Hello", "Fine")
    events = session.ask("Hi")
    next(events)
    session.interrupt()
    listen(events)
    assert listen(session.ask("Hi"))[0] == "Fine"


def test_a_held_back_stop_string_is_not_remembered_when_interrupted(session_of):
    """ "END" may begin at "E": it was not shown, so the next turn does not know it."""
    session = session_of([*"ABE", KeyboardInterrupt()], "Fine", stop=["END"])
    text, _ = listen(session.ask("Hi"))
    assert (text, session.messages[-1].ids) == ("AB", tuple(map(ord, "AB")))


@pytest.mark.parametrize("failure", [PromptError("too long"), RuntimeError("broken")])
@pytest.mark.parametrize("said", ["", "Hel"])
def test_a_failing_turn_leaves_no_trace(session_of, failure, said):
    session = session_of("Hello", [*said, failure], "Fine")
    listen(session.ask("Hi"))
    before = list(session.messages)
    with pytest.raises(type(failure)):
        list(session.ask("What?"))
    assert session.messages == before
    assert listen(session.ask("Again"))[0] == "Fine"


def test_a_turn_that_is_stopped_before_it_says_anything_leaves_no_trace(session_of):
    session = session_of([KeyboardInterrupt()])
    assert listen(session.ask("Hi"))[1].reason == "interrupted"
    assert session.messages == []


def test_an_empty_answer_is_an_answer(session_of):
    session = session_of("")
    assert listen(session.ask("Hi"))[0] == ""
    assert session.messages[-1].ids == ()


def test_a_question_asked_again_gets_another_seed_and_a_new_session_the_same(session_of):
    def seeds():
        session = session_of("a", "b", sampling=SamplingOptions(seed=7))
        ends = [listen(session.ask("Hi"))[1] for _ in range(2)]
        assert [end.seed for end in ends] == [s.seed for s in session.engine.samplings]
        return [end.seed for end in ends]

    assert seeds() == seeds() == [7, 8]


def test_text_arrives_before_the_next_token_is_asked_for(session_of):
    """A closed pipe has to be noticed within one token."""
    session = session_of("Hello")
    events = session.ask("Hi")
    assert next(events) == TextDelta("H")
    assert session.engine.stats.generated_tokens == 1


class SpacelessTokenizer(CharacterTokenizer):
    """Shows no leading space, as SentencePiece does."""

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


@pytest.mark.parametrize(("continues", "text"), [(True, " world"), (False, "world")])
def test_a_completion_keeps_the_space_that_it_goes_on_with(continues, text):
    template = PlainTemplate(continues_prompt=continues)
    engine = ScriptedEngine(" world")
    session = ChatSession(engine, SpacelessTokenizer(), template, sampling=SamplingOptions())
    assert listen(session.ask("Hello"))[0] == text
