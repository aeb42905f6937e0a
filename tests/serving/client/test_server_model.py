"""A session that a server answers is like any other, except for what only an engine knows."""

import pytest
from patience import PATIENCE_S
from scripted_server import DONE, STREAM, Answer, ScriptedServer, delta, event, refusal, says, usage

from mixchat.base.errors import PromptError, ServerError, UsageError
from mixchat.base.options import ChatOptions
from mixchat.chat.session import ChatSession
from mixchat.face import request
from mixchat.face.events import End, LeftOut, Piece, Reading
from mixchat.serving.client.server_client import ServerClient
from mixchat.serving.client.server_json import ListedModel
from mixchat.serving.client.server_model import ServerModel
from mixchat.serving.client.server_url import ServerURL
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.messages import Message


def session_with(server, context_size=None, **options):
    client = ServerClient(ServerURL.parse(server.address))
    form = options.pop("form", None)
    model = ServerModel(client, ListedModel("tiny", context_size))
    return ChatSession(model, ChatOptions(**options), form)


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def contents(session):
    return [message.content for message in session.history]


def test_an_answer_comes_in_pieces_and_is_remembered_without_ids():
    with ScriptedServer(says("Hel", "lo", counts=usage(7, 3, 4))) as server:
        session = session_with(server)
        events = list(session.ask("Hi"))
    assert events[0] == Reading(0, 0)
    assert [event.text for event in events[1:-1]] == ["Hel", "lo"]
    assert isinstance(events[-1], End)
    assert events[-1].reason == "stop"
    stats = events[-1].stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (7, 4, 3)
    assert stats.prefill_seconds > 0
    assert contents(session) == ["Hi", "Hello"]
    assert session.history[1].ids is None
    assert session.used_tokens == 10


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}
JSON_SCHEMA = {"name": "answer", "strict": True, "schema": SCHEMA}
SAMPLING = {"temperature": 0.7, "top_k": 0, "seed": 5}  # defaults of mixchat, perhaps not of others


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        (
            {"sampling": SAMPLING, "max_tokens": 9, "stop": ["END"]},
            {**SAMPLING, "max_tokens": 9, "stop": ["END"]},
        ),
        (
            {"form": OutputConstraint("", SCHEMA)},
            {"response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA}},
        ),
        ({"think": "off"}, {"chat_template_kwargs": {"enable_thinking": False}}),
    ],
    ids=["nothing", "sampling", "form", "thinking"],
)
def test_the_conversation_and_what_was_asked_for_are_sent_and_nothing_else(options, fields):
    with ScriptedServer(says("Hello"), says("Fine")) as server:
        session = session_with(server, system="Be brief", **options)
        list(session.ask("Hi"))
        list(session.ask("And?"))
    first, second = server.asked()
    texts = [(message["role"], message["content"]) for message in second.pop("messages")]
    assert texts == [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
    ]
    always = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    assert first == {**always, "messages": first["messages"], **fields}
    # The same question gets another answer.
    assert second == {**always, **fields, **({"seed": 6} if "seed" in fields else {})}


@pytest.mark.parametrize(
    "ending",
    [
        [delta(None, "stop"), DONE],
        [delta("!", "stop")],  # no [DONE]
        [delta("!", "stop"), b"data: garbage\n\n"],
        [delta("!", "stop"), usage(3, 2).strip()],
    ],
)
def test_an_answer_has_ended_when_the_server_says_so_in_one_way_or_another(ending):
    with ScriptedServer(Answer([delta("Hi"), *ending])) as server:
        session = session_with(server)
        *_, finished = session.ask("Hi")
    assert finished.reason == "stop"
    assert not session.history[-1].partial


@pytest.mark.parametrize(
    "answer",
    [
        Answer([delta("Hi", "stop")], end="hold"),
        Answer([delta("Hi", "stop"), *[b": ping\n\n"] * 10**6]),
    ],
    ids=["silent", "pings"],
)
def test_a_server_that_forgets_to_hang_up_does_not_hold_the_answer(monkeypatch, answer):
    monkeypatch.setattr("mixchat.serving.client.patience._END_S", 0.01)
    with ScriptedServer(answer) as server:
        *_, finished = session_with(server).ask("Hi")
        assert finished.reason == "stop"
        assert server.gone.wait(PATIENCE_S)


def test_without_counts_of_the_server_those_of_the_pieces_are_shown():
    with ScriptedServer(says("a", "b", "c", reason="length")) as server:
        session = session_with(server)
        *_, finished = session.ask("Hi")
    assert (finished.reason, finished.stats.generated_tokens) == ("length", 3)
    assert session.history[-1].partial
    assert session.used_tokens is None


@pytest.mark.parametrize(
    "ending",
    [
        Answer([delta("Hel")]),
        Answer([delta("Hel"), DONE]),  # no reason
        Answer([delta("Hel")], end="reset"),
        Answer([delta("Hel"), event({"error": {"message": "no memory"}})]),
        Answer([delta("Hel"), event({"error": {"message": "m", "code": "model_not_found"}})]),
        Answer([delta("Hel"), b"data: {broken\n\n"]),
        Answer([delta("Hel"), b"data: " + b"x" * 2**21]),
        Answer([delta("Hel"), event([1, 2])]),
        Answer([delta("Hel"), event({"choices": [{"delta": {"content": 5}}]})]),
        Answer([b"5\r\n", b"data:"], headers=STREAM | {"Transfer-Encoding": "chunked"}),
        Answer([b"zz\r\n", b"data:"], headers=STREAM | {"Transfer-Encoding": "chunked"}),
        Answer([delta("Hel")], headers=STREAM | {"Content-Length": "9999"}),
    ],
)
def test_an_answer_that_breaks_off_is_one_line_and_what_was_shown_is_kept(ending):
    with ScriptedServer(ending, says("Fine")) as server:
        session = session_with(server)
        shown = []
        with pytest.raises(ServerError) as error:
            shown.extend(session.ask("Hi"))
        before = contents(session)
        list(session.ask("Again"))
    assert "\n" not in str(error.value)
    if b"Hel" in b"".join(ending.pieces):
        assert before == ["Hi", "Hel"]
        assert server.asked()[1]["messages"][1] == {"role": "assistant", "content": "Hel"}
    else:
        assert before == []


@pytest.mark.parametrize("way", ["interrupt", "close"])
def test_an_answer_that_is_stopped_ends_the_request_and_keeps_what_was_shown(way):
    pieces = [delta("One"), delta(" two"), delta(" three")]
    with ScriptedServer(Answer(pieces, end="hold")) as server:
        session = session_with(server)
        answer = session.ask("Count")
        next(answer)  # nothing is read yet
        assert next(answer).text == "One"
        if way == "interrupt":
            session.interrupt()
            assert next(answer).reason == "interrupted"
        else:
            answer.close()
        assert server.gone.wait(PATIENCE_S)
    assert contents(session) == ["Count", "One"]
    assert session.history[-1].partial


def test_progress_is_what_the_server_tells_in_comments():
    pieces = [b": waiting\n\n", b": read 5 of 20 tokens\n\n", b": read 30 of 20 tokens\n\n"]
    with ScriptedServer(Answer([*pieces, delta("Hi", "stop"), DONE])) as server:
        events = list(session_with(server).ask("Hi"))
    assert events[:-2] == [Reading(0, 0), Reading(5, 20)]


TOO_LONG = refusal("400 Bad Request", "too many tokens", "context_length_exceeded")


def with_turns(server, count, **options):
    from mixchat.text.messages import Message

    session = session_with(server, **options)
    turns = [(Message("user", f"q{i}"), Message("assistant", f"a{i}")) for i in range(count)]
    session.restore([message for turn in turns for message in turn])
    return session


def test_a_conversation_that_the_server_finds_too_long_says_how_old_turns_go():
    with ScriptedServer(TOO_LONG) as server:
        with pytest.raises(PromptError, match="too many tokens") as error:
            list(with_turns(server, 2).ask("last"))
        assert "drop-oldest" in error.value.hint


def test_old_turns_are_left_out_by_halves_until_it_fits_the_server():
    with ScriptedServer(TOO_LONG, TOO_LONG, says("Fine"), says("Well")) as server:
        session = with_turns(server, 5, overflow="drop-oldest")
        events = list(session.ask("last"))
        list(session.ask("more"))
    assert events[0] == LeftOut(4, 8)
    sent = [[m["content"] for m in body["messages"]] for body in server.asked()]
    assert [texts[0] for texts in sent] == ["q0", "q3", "q4", "q4"]
    assert len(session.history) == 14


def test_a_question_that_does_not_fit_alone_is_refused():
    with ScriptedServer(TOO_LONG, TOO_LONG) as server:
        session = with_turns(server, 1, overflow="drop-oldest")
        with pytest.raises(PromptError):
            list(session.ask("last"))
    assert len(server.asked()) == 2


def test_a_text_that_cannot_fit_a_known_context_is_not_sent():
    with ScriptedServer() as server, pytest.raises(PromptError):
        list(session_with(server, context_size=2).ask("x" * 1000))
    assert server.requests == []


def test_an_answer_is_continued_by_sending_its_beginning():
    with ScriptedServer(says("One", reason="length"), says(" two")) as server:
        session = session_with(server)
        list(session.ask("Count"))
        assert text_of(session.continue_answer()) == " two"
    assert server.asked()[1]["messages"][-1] == {"role": "assistant", "content": "One"}
    assert contents(session) == ["Count", "One two"]


def test_what_only_an_engine_knows_is_said_in_one_line():
    with ScriptedServer() as server:
        session = session_with(server)
    with pytest.raises(UsageError, match="a server answers here"):
        session.engine  # noqa: B018
    assert session.context is None
    assert session.used_tokens == 0
    assert not session.is_closed


def test_tokens_are_not_known_any_more_when_the_conversation_has_changed():
    with ScriptedServer(says("a", counts=usage(5, 2)), says("b", counts=usage(9, 2))) as server:
        session = session_with(server)
        list(session.ask("Hi"))
        list(session.ask("And?"))
    assert session.used_tokens == 11
    session.undo()
    assert session.used_tokens is None


@pytest.mark.parametrize(("size", "reason"), [(12, "context"), (13, "length"), (None, "length")])
def test_an_answer_that_fills_a_known_context_is_told_from_one_of_full_length(size, reason):
    with ScriptedServer(says("a", reason="length", counts=usage(9, 3))) as server:
        *_, finished = session_with(server, context_size=size).ask("Hi")
    assert finished.reason == reason


def test_the_pieces_of_an_answer_are_joined_once(monkeypatch):
    """An answer without an end took minutes until it was too long, and 60,000 counts 13 seconds."""
    joined, shown_message = [], request.shown_message
    monkeypatch.setattr(
        "mixchat.serving.client.server_model.shown_message",
        lambda *parts: joined.append(1) or shown_message(*parts),
    )
    pieces = [event for n in range(9) for event in (delta("x"), usage(3, n + 1))]
    with ScriptedServer(Answer([*pieces, delta("!", "stop"), DONE])) as server:
        client = ServerClient(ServerURL.parse(server.address))
        *_, end = ServerModel(client, ListedModel("tiny")).send({})
    assert len(joined) == 1
    assert (end.stats.prompt_tokens, end.stats.generated_tokens) == (3, 10)


def test_an_answer_without_an_end_is_ended_by_what_the_context_can_hold():
    endless = Answer([delta("x" * 10_000)] * 100)
    with ScriptedServer(endless) as server:
        session = session_with(server, context_size=100)
        with pytest.raises(ServerError, match="more text than its context can hold"):
            list(session.ask("Hi"))


def thinks(text):
    return event({"choices": [{"index": 0, "delta": {"reasoning_content": text}}]})


def test_a_servers_thinking_comes_apart_and_is_not_sent_back():
    first = Answer([thinks("Hm"), thinks("."), delta("Yes"), delta(None, "stop"), DONE])
    with ScriptedServer(first, says("Fine")) as server:
        session = session_with(server)
        events = list(session.ask("Hi"))
        list(session.ask("So?"))
        sent = [request.body for request in server.requests]
    thinking = [Piece("", "Hm", thinking_tokens=1), Piece("", ".", thinking_tokens=2)]
    assert events[1:4] == [*thinking, Piece("Yes", thinking_tokens=2)]
    assert session.history[1] == Message("assistant", "Yes", None, False, "Hm.", 2)
    assert [message["content"] for message in sent[1]["messages"]] == ["Hi", "Yes", "So?"]
    assert "chat_template_kwargs" not in sent[1]


def test_an_answer_that_breaks_off_within_its_thinking_is_remembered():
    with ScriptedServer(Answer([thinks("Hm")], end="reset")) as server:
        session = session_with(server)
        with pytest.raises(ServerError):
            list(session.ask("Hi"))
    assert session.history[1] == Message("assistant", "", None, True, "Hm", 1)
