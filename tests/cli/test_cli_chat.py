"""The chat as a person meets it: a process in a pseudo-terminal."""

import pyte
import pytest
from command_line import FAKE
from terminal import Terminal

ENTER, CTRL_C, CTRL_D, UP = "\r", "\x03", "\x04", "\x1b[A"


def test_a_chat_from_hello_to_goodbye(environment, tmp_path):
    variables = environment | {
        "SCRIPT": '["Hello", "Fine", "Twice"]',
        "PROMPTS": str(tmp_path / "p"),
    }
    with Terminal([*FAKE, "run", "--verbose"], variables) as terminal:
        terminal.wait_for("/help")
        terminal.enter("Hi")
        terminal.wait_for("Hello")
        terminal.wait_for("(hit rate 75.0%)")
        terminal.enter("How are you?")
        terminal.wait_for("Fine")
        terminal.wait_for(">>>")
        terminal.type(UP)
        terminal.wait_for("How are you?")
        terminal.type(ENTER)
        terminal.wait_for("Twice")
        terminal.leave()
    prompts = (tmp_path / "p").read_text().split("\n---\n")
    assert prompts[2].count("[user]How are you?") == 2


@pytest.mark.parametrize(("model", "is_toy"), [("demo", True), ("mine", False)])
def test_a_chat_with_the_demo_says_that_it_is_a_toy(environment, model, is_toy):
    """Its wrong answers were taken for mixchat's."""
    with Terminal([*FAKE, "run", "-m", model], environment) as terminal:
        terminal.wait_for("Ctrl-D leaves")
        assert (b"a toy to see how mixchat works" in terminal.screen) == is_toy
        terminal.leave()


def test_ctrl_c_stops_an_answer_and_the_chat_continues(environment, tmp_path):
    answer = "x" * 2000
    variables = environment | {
        "SCRIPT": f'["{answer}", "Fine"]',
        "DELAY": "0.05",
        "PROMPTS": str(tmp_path / "p"),
    }
    with Terminal([*FAKE, "run"], variables) as terminal:
        terminal.enter("Hi")
        terminal.wait_for("xxx")
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped; /continue resumes it)")
        terminal.enter("Well?")
        terminal.wait_for("Fine")
        terminal.wait_for(">>>")
        terminal.type(CTRL_C)
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for(">>>")
        terminal.type(CTRL_C)
        assert terminal.wait_for_end() == 0
    said = (tmp_path / "p").read_text().split("\n---\n")[1]
    said = said.removeprefix("[user]Hi[assistant]").removesuffix("[user]Well?")
    assert 3 <= len(said) < 2000
    assert set(said) == {"x"}


def test_a_prompt_at_a_terminal_does_not_wait_for_stdin(environment):
    with Terminal([*FAKE, "run", "Hi"], environment) as terminal:
        terminal.wait_for("Hello")
        assert terminal.wait_for_end() == 0


def test_what_is_typed_during_an_answer_is_done_line_by_line(environment, tmp_path):
    """Several lines became one draft, commands included, and Ctrl-D was lost."""
    variables = environment | {
        "SCRIPT": '["One, slowly.", "Two.", "Three."]',
        "DELAY": "0.05",
        "PROMPTS": str(tmp_path / "p"),
    }
    with Terminal([*FAKE, "run"], variables) as terminal:
        terminal.enter("First")
        terminal.wait_for("One")
        terminal.type("Second" + ENTER + "/clear" + ENTER + "Third" + ENTER + CTRL_D)
        terminal.wait_for("Three.")
        assert terminal.wait_for_end() == 0
    prompts = (tmp_path / "p").read_text().split("\n---\n")
    assert prompts[1].endswith("[user]Second")
    assert prompts[2] == "[user]Third"


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_prompt_question_and_error_have_colours_unless_they_are_switched_off(
    environment, variables
):
    """All of a chat was grey."""
    environment = {key: value for key, value in environment.items() if key != "NO_COLOR"}
    with Terminal([*FAKE, "run"], environment | variables) as terminal:
        terminal.enter("/nonsense")
        terminal.wait_for("hint:")
        terminal.type("Hi" + ENTER)
        terminal.wait_for("Hello")
        terminal.leave()
    seen = pyte.Screen(80, 24)
    pyte.ByteStream(seen).feed(terminal.screen)
    colours = {
        "".join(row[x].data for x in range(80)).split()[0]: (row[0].fg, row[4].fg)
        for row in (seen.buffer[y] for y in range(1, 4))
    }
    painted = {">>>": ("green", "green"), "error:": ("red", "red"), "hint:": ("default",) * 2}
    assert colours == {
        word: ("default", "default") if variables else pair for word, pair in painted.items()
    }


LOADS = {"LOADING": "60"}  # longer than any test


def test_a_person_types_while_the_model_loads(environment):
    """The prompt came only after the model, seconds later."""
    with Terminal([*FAKE, "run"], environment | LOADS) as terminal:
        terminal.enter("/help read")
        terminal.wait_for("put the text of a file")
        terminal.wait_for(">>>")
        terminal.type("half a question")
        terminal.wait_for("half a question")
        terminal.type(CTRL_C + CTRL_D)
        assert terminal.wait_for_end() == 0


def test_ctrl_c_ends_the_wait_for_a_model_and_not_the_chat(environment):
    with Terminal([*FAKE, "run"], environment | LOADS) as terminal:
        terminal.enter("Hi")
        terminal.wait_for("loading instruct")
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped)")
        terminal.enter("/bye")
        assert terminal.wait_for_end() == 0


def test_a_question_waits_for_the_model(environment):
    with Terminal(
        [*FAKE, "run"], environment | {"LOADING": "1", "NOTE": "less memory"}
    ) as terminal:
        terminal.enter("Hi")
        terminal.wait_for("Hello")
        assert b"less memory" in terminal.screen
        terminal.leave()


@pytest.mark.parametrize("keys", ["a question", "a question" + ENTER])
def test_a_model_that_cannot_be_loaded_ends_the_chat_and_keeps_what_was_typed(environment, keys):
    with Terminal([*FAKE, "run"], environment | {"LOADING": "1", "FAULT": "damaged"}) as terminal:
        terminal.wait_for(">>>")
        terminal.type(keys)
        terminal.wait_for("error: damaged")
        assert terminal.wait_for_end() == 6
    with Terminal([*FAKE, "run"], environment) as terminal:
        terminal.wait_for(">>>")
        terminal.type(UP)
        terminal.wait_for("a question")
