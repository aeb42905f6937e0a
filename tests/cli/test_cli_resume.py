"""Saved chats, and resumed ones: `--resume`, `--no-save`, `--keep-cache`."""

import errno
import json
import os
import signal

import pytest
from command_line import FAKE
from terminal import Terminal

from mixchat.chat.saved.chat_store import ChatStore
from mixchat.cli.flags.run_flags import with_last_chat

ENTER, CTRL_D = "\r", "\x04"


@pytest.fixture
def chat(environment, tmp_path):
    """Types questions into `mixchat run FLAGS`; returns what was asked of the engine."""
    prompts = tmp_path / "prompts"

    def chat(*flags, answers=(), questions=()):
        prompts.write_text("")
        script = {"SCRIPT": json.dumps(answers), "PROMPTS": str(prompts)}
        with Terminal([*FAKE, "run", *flags], environment | script) as terminal:
            for question, answer in zip(questions, answers, strict=True):
                terminal.enter(question)
                terminal.wait_for(answer)
            terminal.leave()
        return prompts.read_text().split("\n---\n")[:-1]

    return chat


@pytest.fixture
def ids(environment, tmp_path):
    """The IDs of the saved chats, the oldest first."""
    return lambda: sorted(chat.id for chat in ChatStore(tmp_path / "home/chats").all())


@pytest.fixture
def ask(mixchat, tmp_path):
    """Answer a question with `mixchat run FLAGS`, and return what was asked of the engine."""

    def ask(*flags, answer="Hello", question="Hi", **variables):
        variables |= {"SCRIPT": json.dumps([answer]), "PROMPTS": str(tmp_path / "prompts")}
        (tmp_path / "prompts").write_text("")
        assert mixchat("run", *flags, question, **variables).returncode == 0
        return (tmp_path / "prompts").read_text().removesuffix("\n---\n")

    return ask


def test_a_chat_is_saved_and_resumed(chat, ask, ids):
    chat("-s", "Be brief", answers=["Hello"], questions=["Hi"])
    (saved,) = ids()
    prompts = chat("--resume", answers=["Fine"], questions=["Again"])
    assert prompts == ["[system]Be brief[user]Hi[assistant]Hello[user]Again"]
    for count, wanted in enumerate([("-r", saved), (f"--resume={saved[:12]}",)], 2):
        prompt = ask(*wanted, question="Again")
        assert prompt.startswith("[system]Be brief[user]Hi[assistant]Hello[user]Again")
        assert prompt.count("[assistant]") == count
        assert ids() == [saved]


def test_a_turn_that_fails_to_be_printed_is_saved_all_the_same(mixchat, ids):
    """With -x, an answer without code was computed, not printed, and gone."""
    mixchat("run", "--save", "Hi")
    assert mixchat("run", "-x", "-r", ids()[0], "Again", SCRIPT='["No code"]').returncode == 9
    shown = json.loads(mixchat("chats", "--json", ids()[0]).stdout)
    assert [m["content"] for m in shown["messages"]] == ["Hi", "Hello", "Again", "No code"]


def test_a_chat_whose_terminal_is_closed_keeps_what_was_said(environment, ids, mixchat):
    variables = environment | {"SCRIPT": json.dumps(["x" * 500]), "DELAY": "0.05"}
    with Terminal([*FAKE, "run"], variables) as terminal:
        terminal.enter("Hi")
        terminal.wait_for("xxx")
        terminal.process.send_signal(signal.SIGHUP)
        assert terminal.wait_for_end() == 129
    shown = json.loads(mixchat("chats", "--json", ids()[0]).stdout)
    assert shown["messages"][1]["content"].startswith("xxx")
    assert shown["messages"][1]["partial"] is True


def test_one_answer_is_not_saved_unless_that_is_asked_for(mixchat, ids):
    mixchat("run", "Hi")
    assert ids() == []
    mixchat("run", "Hi", MIXCHAT_SAVE="1")
    assert ids() == []
    mixchat("run", "--save", "Hi")
    assert len(ids()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_answer_that_cannot_be_saved_is_there_and_the_exit_code_says_it(
    mixchat, monkeypatch, number
):
    """A script that asked for --save was told 0, and its chat was nowhere."""

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sqlite3.connect", refuse)
    done = mixchat("run", "--save", "Hi")
    assert (done.returncode, done.stdout) == (7, b"Hello\n")
    error, hint = done.stderr.decode().splitlines()
    assert "the chat cannot be saved" in error
    assert os.strerror(number) in error
    assert hint.startswith("hint: The answer is whole.")


def test_a_chat_in_the_terminal_that_cannot_be_saved_says_so_by_its_exit_code(
    environment, tmp_path
):
    """It was said once, maybe an hour before the end, and the exit code was 0."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/chats").write_text("")
    with Terminal([*FAKE, "run"], environment) as terminal:
        terminal.enter("Hi")
        terminal.wait_for("cannot be saved")
        terminal.enter("/bye")
        terminal.wait_for("/export FILE")
        terminal.enter("/bye")
        terminal.wait_for("cannot be saved")
        assert terminal.wait_for_end() == 7


def test_a_question_that_is_refused_leaves_the_chat_as_it_is(mixchat, ids, tmp_path):
    mixchat("run", "--save", "Hi")
    file = tmp_path / "home/chats/chats.db"
    before = file.read_bytes()
    failing = json.dumps([[{"raise": "PromptError", "with": "too long"}]])
    assert mixchat("run", "-r", ids()[0], "-s", "Be new", "Hi", SCRIPT=failing).returncode == 3
    assert file.read_bytes() == before


def test_a_variable_does_not_go_before_what_a_chat_has_and_a_flag_does(ask, ids, tmp_path):
    ask("--save", "-s", "Be brief", "-n", "3", answer="Hel")
    resume = ("--resume", ids()[0])
    prompt = ask(*resume, MIXCHAT_SYSTEM="Be new", MIXCHAT_MODEL="nosuch")
    assert prompt.startswith("[system]Be brief[user]Hi")
    assert ask(*resume, "-s", "Be old").startswith("[system]Be old[user]Hi")
    (tmp_path / "persona").write_text("Be odd")
    persona = str(tmp_path / "persona")
    assert ask(*resume, MIXCHAT_SYSTEM_FILE=persona).startswith("[system]Be old[user]Hi")
    assert ask(*resume, "--system-file", persona).startswith("[system]Be odd[user]Hi")


def test_a_chat_that_is_not_to_be_saved_leaves_nothing(chat, ids, tmp_path):
    chat("--no-save", answers=["Hello"], questions=["Hi"])
    assert ids() == []
    assert not (tmp_path / "home/history").exists()


def test_the_model_of_the_chat_is_taken_unless_a_flag_names_another(mixchat, ids):
    mixchat("run", "--save", "-m", "demo", "Hi")
    run = ("run", "--json", "--resume", ids()[0], "Again")
    assert json.loads(mixchat(*run).stdout)["model"] == "demo"
    assert json.loads(mixchat(*run, "-m", "base").stdout)["model"] == "base"


def test_a_chat_that_is_not_there_is_an_error(mixchat):
    done = mixchat("run", "--resume", "nothing", "Hi")
    assert (done.returncode, done.stdout) == (4, b"")
    assert done.stderr.startswith(b"error: there is no saved chat 'nothing'")
    assert b"hint: " in done.stderr
    assert mixchat("run", "Hi", "--resume").returncode == 4


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--resume"], ["--resume=last"]),
        (["-r", "--raw"], ["--resume=last", "--raw"]),
        (["--resume", "sea", "Hi"], ["--resume", "sea", "Hi"]),
        (["--resume=sea"], ["--resume=sea"]),
        (["Hi", "--", "--resume"], ["Hi", "--", "--resume"]),
        ([], []),
    ],
)
def test_resume_without_a_value_means_the_last_chat(given, read):
    assert with_last_chat(given) == read
