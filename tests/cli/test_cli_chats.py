"""`mixchat chats`: lists, prints, removes."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from chat_files import chat_of
from command_line import FAKE, loaded_by
from terminal import Terminal

from mixchat.chat.saved.chat_store import ChatStore
from mixchat.text.messages import Message

BEGAN = datetime(2026, 11, 25, 16, 30, tzinfo=UTC)
SKY, SEA = "20261125-1630-k3f", "20261124-0900-abc"


@pytest.fixture
def store(environment):
    return ChatStore(Path(environment["MIXCHAT_HOME"]) / "chats")


@pytest.fixture
def keep(store):
    def write(id, question, answer="Yes.", *, hours=0, model="instruct", name=None):
        used = BEGAN + timedelta(hours=hours)
        talk = (Message("user", question), Message("assistant", answer))
        store.save(chat_of(id, talk, name=name, model=model, created=BEGAN, updated=used))

    return write


def lines_of(done):
    return done.stdout.decode().splitlines()


def test_the_list_is_a_table_with_the_newest_first(mixchat, keep):
    keep(SKY, "Why is the\nsky blue?")
    keep(SEA, "Why is the sea salty?", hours=2, model="org/模型", name="Salt of the sea")
    head, *rows = lines_of(mixchat("chats"))
    used = BEGAN.astimezone()
    assert head == "ID                 LAST USED         MODEL     TURNS  ABOUT"
    assert rows == [
        f"{SEA}  {used + timedelta(hours=2):%Y-%m-%d %H:%M}  org/模型  1      Salt of the sea",
        f'{SKY}  {used:%Y-%m-%d %H:%M}  instruct  1      "Why is the sky blue?"',
    ]


def test_nothing_in_a_chat_acts_on_the_terminal(mixchat, keep):
    keep(SKY, "\x1b[2Jred\x9b\u202e", model="\x1b]0;x\x07")
    row = lines_of(mixchat("chats"))[1]
    assert row.endswith('"[2Jred"')
    assert row.isprintable()


def test_damaged_chats_are_said_to_be_in_one_line_and_stay(mixchat, keep, store):
    keep(SKY, "Why?")
    store.path.write_bytes(b"{" * 5000)
    for arguments in ((), (SKY,), ("--search", "why"), (SKY, "--rm")):
        done = mixchat("chats", *arguments)
        assert (done.stdout, done.returncode) == (b"", 6)
        assert b"chats.db is damaged (file is not a database)\nhint: Move it away" in done.stderr
    done = mixchat("run", "--save", "Hi")
    assert (done.stdout, done.returncode) == (b"Hello\n", 7)
    assert store.path.read_bytes() == b"{" * 5000


def test_a_search_lists_the_chats_with_a_word_and_its_passage(mixchat, keep):
    keep(SKY, "Why is the sky blue?", "Because of\nRayleigh scattering.")
    keep(SEA, "Why is the sea salty?", name="Salt")
    (row,) = lines_of(mixchat("chats", "--search", "rayleigh"))[1:]
    assert row.startswith(SKY)
    assert row.endswith('"Because of Rayleigh scattering."')
    found = json.loads(mixchat("chats", "--search", "why", "--json").stdout)
    assert [chat["id"] for chat in found] == [SKY, SEA]
    done = mixchat("chats", "--search", "moon")
    assert (done.stdout, done.returncode) == (b"", 4)
    assert done.stderr == b"error: no saved chat has the text 'moon'\n"


def test_the_list_as_json_is_for_programs(mixchat, keep):
    keep(SKY, "Why?", name="sky")
    assert json.loads(mixchat("chats", "--json").stdout) == [
        {
            "id": SKY,
            "name": "sky",
            "model": "instruct",
            "turns": 1,
            "question": "Why?",
            "created": "2026-11-25T16:30:00+00:00",
            "updated": "2026-11-25T16:30:00+00:00",
        }
    ]


def test_a_chat_is_printed_as_markdown_word_for_word(mixchat, keep):
    keep(SKY, "Why?", "So: \x1b[1m`x`")
    for wanted in (SKY, "2026"):
        assert "\n## Answer\n\nSo: \x1b[1m`x`\n" in mixchat("chats", wanted).stdout.decode()


def test_a_chat_is_removed(mixchat, keep, store):
    keep(SKY, "Why?")
    keep(SEA, "Why not?")
    done = mixchat("chats", SKY, "--rm")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert done.stderr.decode() == f"removed {SKY}\n"
    assert mixchat("chats", "--rm", "20261124").returncode == 0
    assert store.all() == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nobody"], 4),
        (["2026"], 4),
        (["../chats/x"], 4),
        (["2026", "--rm"], 4),
        (["--rm"], 2),
        ([SKY, "--rm", "--json"], 2),
        ([SKY, "--search", "x"], 2),
        (["--search", "x", "--rm"], 2),
        (["--search", ""], 2),
        ([""], 2),
        ([b"\xff"], 2),
    ],
)
def test_what_cannot_be_done_changes_nothing(mixchat, keep, store, arguments, code):
    keep(SKY, "Why?")
    keep(SEA, "Why not?")
    done = mixchat("chats", *arguments)
    assert (done.stdout, done.returncode) == (b"", code)
    assert done.stderr.startswith(b"error: ")
    assert len(store.all()) == 2


def test_on_a_terminal_it_says_how_to_go_on_and_fits_the_screen(environment, keep):
    keep(SKY, "x" * 150)
    with Terminal([*FAKE, "chats"], environment) as terminal:
        shown = terminal.wait_for(f"mixchat run --resume {SKY}")
        assert terminal.wait_for_end() == 0
    row = next(line for line in shown.splitlines() if line.startswith(SKY))
    assert len(row) == 80
    assert row.endswith('..."')


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        ([], {"torch", "prompt_toolkit", "markdown_it", "huggingface_hub"}),
        ([SKY], {"torch", "prompt_toolkit", "rich", "huggingface_hub"}),
    ],
)
def test_it_answers_at_once_because_nothing_heavy_is_imported(
    environment, keep, arguments, unneeded
):
    keep(SKY, "Why?")
    code, output, loaded = loaded_by(environment, "chats", *arguments)
    assert (code, bool(output)) == (0, True)
    assert not unneeded & loaded
