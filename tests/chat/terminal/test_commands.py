"""A command after a slash does what /help says it does, or says in one line why not."""

import re
import signal

import pytest
from chat_typing import CTRL_U, error_of, prompts_of, typed

from mixchat.base.errors import MixchatError
from mixchat.chat.terminal.commands import COMMAND_ALIASES, COMMANDS, completions, help_text
from mixchat.chat.terminal.screen import Screen
from mixchat.text.thinking import ThinkingFormat

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_help_names_every_command_with_its_help(session_of):
    text = typed(session_of(), "/help", "/?").text
    for name, command in COMMANDS.items():
        assert len(re.findall(rf"/{name}\b[^/]*  {re.escape(command.help)}\s", text)) == 2


def test_help_fits_a_small_terminal_with_the_prompt_below_it(session_of):
    """It took 25 rows of 24: the first commands had scrolled off."""
    rows = typed(session_of(), "/help").text.splitlines()
    assert len(rows) <= 24 - 3  # the line with /help, the next prompt, the bottom line
    assert max(map(len, rows)) <= 80
    narrow = help_text(40)
    assert max(map(len, narrow.split("\n\n")[0].splitlines())) <= 40


def test_help_explains_one_command(session_of):
    assert typed(session_of(), "/help undo", "/help /exit").text == (
        "/undo [n]  remove the last turn, or the last n; /redo restores them\n"
        "/bye  leave (also /exit, /quit, exit, quit, bye, Ctrl-D)\n"
    )


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/temp 0.2", "Did you mean /set temp?"),
        ("/regne", "Did you mean /regen?"),
        ("/zzz", "/help shows them all."),
    ],
)
def test_an_unknown_command_gets_a_suggestion_and_is_not_sent(session_of, line, hint):
    session = session_of()
    (error,) = typed(session, line).errors
    assert error.hint == hint
    assert session.engine.prompts == []


@pytest.mark.parametrize("line", ["exit", "quit", "bye", "Exit", " quit "])
def test_the_word_alone_leaves_as_in_a_shell(session_of, line):
    """It went to the model, which said good-bye, and the chat went on."""
    session = session_of("never")
    assert typed(session, line, "not read any more").text == ""
    assert session.engine.prompts == []


@pytest.mark.parametrize("line", ["exit code", '"""exit"""', "exit\\nquit"])
def test_a_question_that_only_begins_like_it_is_asked(session_of, line):
    session = session_of("Hello")
    typed(session, line.replace("\\n", "\n"))
    assert len(session.engine.prompts) == 1


@pytest.mark.parametrize("command", ["/set system", "/set  system", "/system"])
def test_system_changes_the_system_prompt(session_of, command):
    """`/set system` said "Did you mean temp?"."""
    session = session_of("a", "b", system="Old")
    lines = ("/system", f"{command} Be brief.\nBe kind.", "Hi", "/system none", "Again")
    assert typed(session, *lines).text.startswith("Old\n")
    assert prompts_of(session) == [
        "[system]Be brief.\nBe kind.[user]Hi",
        "[user]Hi[assistant]a[user]Again",
    ]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("bye", "save")])
def test_no_command_fails_in_an_empty_chat(session_of, store, name):
    chat = typed(session_of(), f"/{name}", store=store)
    for error in chat.errors:
        assert isinstance(error, MixchatError), repr(error)


@pytest.mark.parametrize("name", [*COMMANDS, *COMMAND_ALIASES])
def test_no_command_breaks_on_an_argument_that_it_cannot_use(session_of, store, name):
    chat = typed(session_of("Hello", "Fine"), "Hi", f"/{name} [/red] \\( \u202e ", store=store)
    assert "\u202e" not in chat.text
    for error in chat.errors:
        assert isinstance(error, MixchatError), repr(error)


def test_experts_shows_what_became_of_them(session_of):
    text = typed(session_of("Hello"), "Hi", "/experts").text
    assert re.search(r"^ +0 +24 +75% +1 +1 +0 .100%.$", text, re.M)
    assert "uses     24, 75.0% hits" in text


def test_ctrl_c_within_clear_overwrites_no_chat(session_of, store, monkeypatch):
    """The new conversation was saved over the old one, which was in no file then."""
    session = session_of("Hello", "Fine")
    clear = session.clear

    def cleared_and_interrupted():
        clear()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(session, "clear", cleared_and_interrupted)
    typed(session, "Hi", "/clear", "Again", store=store)
    asked = {store.load(chat.id).messages[0].content for chat in store.all()}
    assert asked == {"Hi", "Again"}


def test_set_changes_a_parameter_in_the_middle_of_a_chat(session_of):
    session = session_of("a", "b", "world", sampling={"temperature": 0.2})
    changes = ("/set temperature 0.25", "/set top-k 7", "/set max-tokens 9")
    more = ("/set temp none", "/set stop ld", "/set overflow drop-oldest", "More")
    typed(session, "Hi", *changes, "Again", *more)
    samplings = [(sampling.temperature, sampling.top_k) for sampling in session.engine.samplings]
    assert samplings == [(0.2, 0), (0.25, 7), (0.2, 7)]
    assert (session.max_tokens, session.overflow) == (9, "drop-oldest")
    assert session.history[-1].content == "wor"


def test_set_without_a_value_shows_one_or_all(session_of):
    """`/set temp` was an error."""
    lines = typed(session_of(), "/set top-p", "/set think", "/set").text.splitlines()
    assert lines[:2] == ["top-p  1.0", "think  show"]
    assert [line.split()[0] for line in lines[2:]] == [
        *("temp", "top-p", "top-k", "min-p", "repeat-penalty", "seed"),
        *("max-tokens", "stop", "overflow", "think"),
    ]


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "temp warm",
            "temp nan",
            "top-k 1.5",
            "top-k 99999999999999999999",
            "max-tokens -1",
            "overflow never",
            "think loud",
        ),
        "tmp 1",
    ],
)
def test_set_refuses_what_a_parameter_cannot_be(session_of, argument):
    session = session_of()
    sampling = session.sampling
    assert argument.split()[0] in error_of(typed(session, f"/set {argument}"))
    assert (session.sampling, session.think) == (sampling, "show")


def test_show_says_what_holds(session_of, store):
    text = typed(session_of("a", system="Be brief"), "Hi", "/show", store=store).text
    for line in (r"model +demo", r"chat +\d{8}-\d{4}-\w{3}", r"turns +1", r"system +Be brief"):
        assert re.search(f"^{line}$", text, re.M)
    assert re.search(r"^temp +0.7$", text, re.M)
    assert re.search(r"^experts +16 RAM slots$", text, re.M)


def test_save_gives_the_chat_a_name_by_which_load_finds_it(session_of, store):
    session = session_of("Hello", "Fine")
    chat = typed(session, "Hi", "/save weather", "/clear", "/load weather", "Again", store=store)
    assert "mixchat run --resume weather" in chat.text
    assert ">>> Hi\nHello" in chat.text
    assert prompts_of(session)[1] == "[user]Hi[assistant]Hello[user]Again"
    assert [(saved.name, saved.turns) for saved in store.all()] == [("weather", 2)]


def test_save_under_another_name_says_from_which_one(session_of, store):
    """The first name was gone without a word."""
    lines = ("Hi", "/save", "/save 'one of two'", "/save two", "/save")
    chat = typed(session_of("Hello"), *lines, store=store)
    said = re.findall(r"^\((saved|renamed from .*);", chat.text, re.M)
    assert said == ["saved", "saved", "renamed from 'one of two'", "saved"]
    assert "--resume 'one of two' resumes" in chat.text  # as a shell wants it
    assert [saved.name for saved in store.all()] == ["two"]


def test_a_chat_without_a_turn_is_listed_nowhere_and_found_by_its_name(session_of, store):
    session = session_of("Hello", "Fine")
    lines = ("Hi", "/clear", "Again", "/save mine", "/undo", "/chats")
    chat = typed(session, *lines, store=store)
    assert '"Hi"' in chat.text
    assert "mine" not in chat.text.rpartition("ABOUT")[2]
    assert "mine" not in dict(completions(chat.active)["load"].argument(""))
    assert store.load("last").messages[0].content == "Hi"
    assert store.load("mine").messages == ()


def test_clear_starts_a_new_chat_and_chats_lists_them(session_of, store):
    session = session_of("Hello", "Fine")
    text = typed(session, "First one", "/clear", "Second one", "/chats", store=store).text
    assert prompts_of(session)[1] == "[user]Second one"
    assert re.search(r'demo +1 +"Second one"\n.*demo +1 +"First one"', text)


def test_chats_with_a_word_lists_the_chats_that_contain_it(session_of, store):
    session = session_of("Rayleigh scattering", "Salt")
    lines = (
        "Why is the sky blue?",
        "/clear",
        "And the sea?",
        "/chats RAYLEIGH",
        "/chats 'no such'",
    )
    chat = typed(session, *lines, store=store)
    listed = chat.text.partition("ABOUT")[2]
    assert '"Rayleigh scattering"' in listed
    assert "sea" not in listed
    assert error_of(chat) == "no saved chat has the text 'no such'"


def test_regen_answers_the_same_question_again_with_another_seed(session_of):
    session = session_of("Hello", "Good day", sampling={"seed": 7})
    typed(session, "Hi", "/regen")
    assert prompts_of(session) == ["[user]Hi"] * 2
    assert [message.content for message in session.history] == ["Hi", "Good day"]
    first, second = session.engine.samplings
    assert first.seed != second.seed


def test_undo_of_too_many_turns_leaves_the_saved_chat_as_it_is(session_of, store):
    """`/undo 99` after `/save` emptied the chat and its file."""
    session = session_of("a", "b")
    chat = typed(session, "one", "two", "/save mine", "/undo 99", store=store)
    assert "fewer than 99" in error_of(chat)
    assert len(session.history) == 4
    assert list(store.load("mine").messages) == session.history


def test_redo_restores_the_turns_in_the_chat_and_in_its_file(session_of, store):
    session = session_of("a", "b", "c")
    chat = typed(session, "one", "two", "/undo 2", "/redo", "three", store=store)
    assert prompts_of(session)[2] == "[user]one[assistant]a[user]two[assistant]b[user]three"
    assert "(2 turns restored)" in chat.text
    typed(session, "/undo", "/redo", store=store)
    typed(session, "/undo 3", "/redo", store=store)
    assert list(store.load("last").messages) == session.history
    assert len(session.history) == 6


def test_edit_offers_the_last_question_and_asks_the_new_one_instead(session_of):
    session = session_of("a", "b", "c", "d")
    typed(session, "one", "two", "/edit", " and a half", "/edit", CTRL_U, "three")
    assert prompts_of(session)[2] == "[user]one[assistant]a[user]two and a half"
    assert [message.content for message in session.history[2:]] == [
        *("two and a half", "c"),
        *("three", "d"),  # the second edit was given up
    ]


def test_continue_continues_the_answer_from_its_end(session_of):
    session = session_of("Hello", "world", max_tokens=3)
    chat = typed(session, "Hi", "/continue")
    assert prompts_of(session)[1] == "[user]HiHel"
    assert session.history[-1].content == "Helwor"
    assert session.history[-1].ids == tuple(map(ord, "Helwor"))
    more = "/continue resumes it, /set max-tokens N allows more"
    assert f"Hel\n(cut off after 3 tokens; {more})\n\nwor" in chat.text


def test_continue_tells_the_screen_what_was_said(session_of, monkeypatch):
    before = []
    show = Screen.show
    monkeypatch.setattr(
        Screen,
        "show",
        lambda self, events, *more, **kw: before.append(more[0]) or show(self, events),
    )
    typed(session_of("```\na", "b", "c"), "Hi", "/continue", "/regen")
    assert before == ["", "```\na", ""]


def test_load_completes_to_each_chat_with_its_question(session_of, store):
    chat = typed(session_of("Hello"), "What is  a mixture?", "/save mine", store=store)
    offered = list(completions(chat.active)["load"].argument(""))
    assert offered == [(name, "What is a mixture?") for name in ("mine", store.all()[0].id)]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        *((f"/{command}", "takes no argument") for command in ("clear x", "bye now", "regen a")),
        *((f"/undo {count}", "/undo takes a number") for count in ("0", "-1", "x", "1.5")),
    ],
)
def test_an_argument_that_a_command_cannot_take_changes_nothing(session_of, line, error):
    session = session_of("Hello")
    assert error in error_of(typed(session, "Hi", line))
    assert len(session.history) == 2


def test_several_lines_are_a_question_though_they_begin_like_a_command(session_of):
    """/clear, pasted with a question below it, cleared the chat and lost the question."""
    session = session_of("Hello", "Fine")
    typed(session, "Hi", "/clear\nWhat is 2+2?")
    assert prompts_of(session)[1].endswith("[user]/clear\nWhat is 2+2?")


def test_tokens_says_how_full_the_context_is(session_of):
    text = typed(session_of("Hello"), "Hi", "/tokens").text
    assert re.search(r"^context +13 of 1,000 tokens \(1%\)$", text, re.M)


def test_raw_switches_markdown_off_and_on(session_of):
    chat = typed(session_of(), "/raw", "/raw")
    assert chat.text == "(answers are shown as plain text)\n(answers are shown as Markdown)\n"


@pytest.mark.parametrize(
    ("thinking", "argument", "said"),
    [
        (ThinkingFormat("tags", ("enable_thinking",)), "off", "takes effect"),
        (ThinkingFormat("harmony"), "hide", "takes effect"),
        (None, "off", "no switch that turns thinking off; if it thinks, that is hidden"),
        (None, "on", "no switch that turns thinking on)"),
    ],
)
def test_set_think_says_what_it_does(session_of, thinking, argument, said):
    session = session_of(thinking=thinking)
    assert said in typed(session, f"/set think {argument}").text
    assert session.think == argument


def test_an_answer_cut_off_while_thinking_says_so(session_of):
    session = session_of("<think>Hmmm", thinking=ThinkingFormat("tags"), max_tokens=9)
    assert typed(session, "Hi").text.startswith(
        "(cut off after 9 tokens while the model was thinking; /continue resumes it"
    )
