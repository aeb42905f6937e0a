"""A chat in a terminal that a server answers."""

import pytest
from command_line import FAKE
from patience import PATIENCE_S
from scripted_server import Answer, ScriptedServer, as_json, delta, refusal, says, usage
from terminal import Terminal

ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"


@pytest.fixture
def chat(environment):
    """A terminal with a chat that a server answers."""
    return lambda server, *flags: Terminal(
        [*FAKE, "run", "--server", server.address, *flags], environment
    )


def test_a_chat_with_a_server_from_hello_to_goodbye(chat):
    models = as_json({"data": [{"id": "tiny", "context_size": 100}, {"id": "other"}]})
    answers = [says("Hello", counts=usage(5, 2)), says("Fine")]
    with ScriptedServer(*answers, models=models) as server, chat(server) as terminal:
        terminal.wait_for("; /help")
        terminal.enter("Hi")
        terminal.wait_for("waiting for the server")
        terminal.wait_for("Hello")
        terminal.enter("/tokens")
        terminal.wait_for("7 of 100 tokens (7%)")
        terminal.type("/experts" + ENTER)
        terminal.wait_for("error: a server answers here, and does not tell of its experts")
        terminal.type("/show" + ENTER)
        terminal.wait_for(f"http://{server.address}/v1")
        terminal.wait_for("left to the server")
        terminal.type("/model" + ENTER)
        terminal.wait_for(f"(also on http://{server.address}/v1: other)")
        terminal.type("/model nonsense" + ENTER)
        terminal.wait_for("error: the server has no model 'nonsense'")
        terminal.type("/set temp 0.7" + ENTER)
        terminal.wait_for("takes effect")
        terminal.type("/model other" + ENTER)
        terminal.wait_for("(the model is other from here on)")
        terminal.enter("How are you?")
        terminal.wait_for("Fine")
        terminal.leave()
    body = server.asked()[1]
    assert (body["model"], body["temperature"]) == ("other", 0.7)
    assert [m["content"] for m in body["messages"]] == ["Hi", "Hello", "How are you?"]


@pytest.mark.parametrize("head", [True, False])
def test_ctrl_c_ends_the_wait_for_a_server_that_is_silent(chat, head):
    silent = Answer(end="hold", head=head)
    with ScriptedServer(silent, says("Fine")) as server, chat(server) as terminal:
        terminal.enter("Count")
        assert server.holds.wait(PATIENCE_S)
        terminal.type(CTRL_C)
        assert server.gone.wait(PATIENCE_S)
        terminal.wait_for("(stopped)")
        terminal.enter("Well?")
        terminal.wait_for("Fine")
        terminal.leave()


def test_a_server_that_goes_away_leaves_the_chat_and_what_it_said(chat):
    with (
        ScriptedServer(Answer([delta("One two")], end="reset"), says(" three")) as server,
        chat(server) as terminal,
    ):
        terminal.enter("Count")
        terminal.wait_for("One two")
        terminal.wait_for("error: ")
        terminal.wait_for("(what came is kept; /continue resumes it)")
        terminal.enter("/continue")
        terminal.wait_for("three")
        terminal.leave()
    assert server.asked()[1]["messages"][-1]["content"] == "One two"


def test_what_a_server_sends_cannot_act_on_the_terminal(chat):
    evil = "a\x1b[2Jb\x9bc\u202ed"
    with (
        ScriptedServer(says(evil), refusal("500 E", f"bad {evil}\nerror: x")) as server,
        chat(server) as terminal,
    ):
        terminal.enter("Hi")
        terminal.wait_for("a[2Jbcd")
        terminal.enter("Hi")
        terminal.wait_for("bad a[2Jbcd error: x")
        terminal.leave()
