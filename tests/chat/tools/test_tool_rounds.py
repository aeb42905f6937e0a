"""A question is answered in rounds: the model calls tools, sees their results, and answers."""

import json

import pytest
from chat_doubles import make_session
from chat_typing import typed

from mixchat.base.errors import PromptError
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.chat.saved.chat_text import to_json, to_markdown
from mixchat.chat.tools.toolbox import Toolbox, ToolStart
from mixchat.face.events import End, Piece, ToolResult
from mixchat.face.tool_results import MAX_ROUNDS, ToolError
from mixchat.text.tool_call import Tool

CALL = '<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call>'


class Clock:
    """A server with one tool, whose results a test gives. An exception is raised."""

    tools = (Tool("time", "The time", {"type": "object", "properties": {"zone": {}}}),)

    def __init__(self, *results):
        self.results, self.calls = list(results), []

    def call(self, name, arguments):
        self.calls.append((name, arguments))
        result = self.results.pop(0) if self.results else "12:00"
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self): ...


def session_with(*script, results=(), allowed=("time",), **options):
    tools = Toolbox(Clock(*results), allowed)
    return make_session(*script, tools=tools, context_size=4000, max_tokens=500, **options)


def roles(session):
    return [message.role for message in session.history]


def test_a_model_calls_a_tool_and_answers_with_its_result():
    session = session_with(f"Wait {CALL}", "Noon.")
    events = list(session.ask("What time is it?"))
    kinds = [type(event) for event in events if type(event) in (ToolStart, ToolResult, End)]
    assert kinds == [ToolStart, ToolResult, End]
    assert "".join(event.text for event in events if isinstance(event, Piece)) == "WaitNoon."
    assert session.tools.servers.calls == [("time", {"zone": "UTC"})]
    assert roles(session) == ["user", "assistant", "tool", "assistant"]
    assert session.history[2].call_id == session.history[1].calls[0].id
    assert "12:00" in "".join(map(chr, session.engine.prompts[1]))
    assert session.used_tokens > 0


def test_a_refused_or_failing_tool_is_told_to_the_model():
    session = session_with(CALL, "No.", allowed=())
    list(session.ask("Time?"))
    assert "does not allow" in session.history[2].content
    assert session.tools.refused == {"time"}
    session = session_with(CALL, "No.", results=[ToolError("no clock")])
    list(session.ask("Time?"))
    assert session.history[2].content == "Error: no clock"


def test_ctrl_c_in_a_call_ends_the_turn_and_the_chat_goes_on():
    session = session_with(CALL, "Noon.", "Fine.", results=[KeyboardInterrupt()])
    *_, end = session.ask("Time?")
    assert end.reason == "interrupted"
    assert roles(session) == ["user", "assistant", "tool"]
    assert "stopped" in session.history[2].content
    list(session.continue_answer())
    assert roles(session) == ["user", "assistant", "tool", "assistant"]
    list(session.ask("And now?"))
    assert len(session.history) == 6


def test_the_rounds_of_a_question_are_bounded():
    session = session_with(*[CALL] * MAX_ROUNDS, "Enough.")
    list(session.ask("Time?"))
    assert len(session.tools.servers.calls) == MAX_ROUNDS
    assert session.history[-1].content == "Enough."
    assert "You can call functions" not in "".join(map(chr, session.engine.prompts[-1]))


def test_results_that_do_not_fit_leave_the_chat_as_it_was():
    """They would have spoiled each later question, too."""
    session = session_with(CALL, results=["x" * 10_000])
    with pytest.raises(PromptError):
        list(session.ask("x" * 2000))
    assert session.history == []


def test_undo_and_regen_take_the_whole_turn():
    session = session_with("Hi", CALL, "Noon.", CALL, "One.")
    list(session.ask("Hello"))
    list(session.ask("Time?"))
    list(session.ask_again())
    assert [message.content for message in session.history[-1:]] == ["One."]
    assert len(session.history) == 6
    session.undo()
    assert roles(session) == ["user", "assistant"]
    assert session.redo() == 1
    assert len(session.history) == 6


def test_a_call_that_was_cut_off_does_not_run():
    session = session_with(CALL[:40])
    list(session.ask("Time?"))
    assert session.tools.servers.calls == []
    assert all(not message.calls for message in session.history)


def test_calls_and_results_are_shown_saved_and_exported(tmp_path):
    store = ChatStore(tmp_path)
    session = session_with(CALL, "Noon.")
    chat = typed(session, "Time?", "/tools", store=store)
    assert chat.errors == []
    assert '[tool] time {"zone": "UTC"}' in chat.text
    assert "[result] 12:00" in chat.text
    assert "time  (runs unasked) The time" in chat.text
    saved = store.load("last")
    assert list(saved.messages) == session.history
    (call,) = json.loads(to_json(saved))["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": '{"zone": "UTC"}'}
    assert "## Result of a tool\n\n> 12:00" in to_markdown(saved)
    resumed = typed(make_session(), f"/load {saved.id}", store=store)
    assert "[tool] time" in resumed.text
    assert "[result] 12:00" in resumed.text


def test_arguments_and_results_cannot_act_on_the_terminal():
    call = CALL.replace("UTC", "a\\u009b31mb")
    session = session_with(call, "x", results=["a\x1b[31m\u202eb\nc"])
    chat = typed(session, "Time?")
    assert "\x1b" not in chat.text
    assert "\u202e" not in chat.text
    assert "[result] a[31mb c" in chat.text
