"""Saved chats: what is saved comes back, whoever saves at once, and damage is said and kept."""

import os
import re
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from chat_files import BEGAN, ID, TALK, chat_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixchat.base.errors import ChatNotFoundError, CheckpointError, ResourceError, UsageError
from mixchat.base.option import options_of
from mixchat.base.options import SamplingOptions, accepted_numbers
from mixchat.chat.saved.chat_store import ChatStore, new_id
from mixchat.chat.saved.saved_chat import checked_name
from mixchat.text.messages import Message

TEXTS = st.text(st.characters(exclude_categories=()))
ANY_NUMBERS = st.integers() | st.floats() | st.fractions() | st.integers(2**62, 2**65)


@pytest.fixture
def three(store):
    """Chats of two days; the one that began first was used last."""
    used = {"20261124-0900-abc": 9, "20261125-1630-k3f": 1, "20261125-1630-k4f": 2}
    for id, hours in used.items():
        store.save(chat_of(id, updated=BEGAN + timedelta(hours=hours)))
    return store


class TestRoundTrip:
    # A top-k of 2^64 and a clock before 1970 were written, and the chat could not be read again.
    @example({"top_k": 2**64, "seed": 2**63 - 1}, datetime(1969, 7, 20, 20, 17, 40), "x")
    # Two halves that were never joined must not come back as one character.
    @example({}, datetime(1970, 1, 1), "\ud83d\ude00 \udcff \0 \r\n \u2028")
    @given(
        st.dictionaries(st.sampled_from([*options_of(SamplingOptions)]), ANY_NUMBERS),
        st.datetimes(datetime(1678, 1, 1), datetime(2261, 1, 1)),  # that a clock can have
        TEXTS,
    )
    @settings(max_examples=100)
    def test_whatever_a_door_accepts_comes_back(self, numbers, moment, text):
        moment = moment.replace(tzinfo=UTC)
        answer = Message("assistant", text, (), partial=True, thinking=text, thinking_tokens=3)
        with tempfile.TemporaryDirectory() as directory:
            chat = chat_of(
                new_id(moment),
                (Message("user", text), answer),
                **{"created": moment, "updated": moment, "system": text, "model": text},
                sampling=accepted_numbers(numbers),
            )
            ChatStore(Path(directory)).save(chat)
            assert ChatStore(Path(directory)).load(chat.id) == chat
            (summary,) = ChatStore(Path(directory)).all()
            assert (summary.updated, summary.model) == (moment, text)

    def test_all_of_a_chat_comes_back(self, store):
        chat = chat_of(name="sky", system="Be brief.\n", updated=BEGAN + timedelta(minutes=3))
        store.save(chat)
        assert store.load(ID) == store.load("sky") == chat


class TestFiles:
    def test_only_the_owner_can_read_whatever_the_umask(self, store):
        before = os.umask(0)
        try:
            store.save(chat_of())
            with sqlite3.connect(store.path) as reader:
                reader.execute("SELECT * FROM chats").fetchone()
                store.save(chat_of())
                modes = {path.name: path.stat().st_mode for path in store.directory.iterdir()}
            reader.close()
        finally:
            os.umask(before)
        assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(mode) for mode in modes.values()} == {0o600}
        assert {"chats.db", "chats.db-wal"} <= set(modes)

    def test_nothing_is_made_by_reading(self, store):
        assert store.all() == []
        assert not store.directory.exists()

    def test_chats_of_a_directory_that_cannot_be_written_can_be_read(self, store, monkeypatch):
        """SQLite could not create its own files there, and said that it cannot open the chats."""
        store.save(chat_of())
        before = os.listdir(store.directory)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        assert (store.load(ID), len(store.all())) == (chat_of(), 1)
        assert os.listdir(store.directory) == before

    @pytest.mark.parametrize("make", [lambda path: path.symlink_to("precious"), os.mkfifo])
    def test_what_is_no_file_of_ours_in_its_place_is_left_alone(self, store, make):
        store.directory.mkdir(parents=True)
        (store.directory / "precious").write_text("precious")
        make(store.path)
        for use in (store.all, lambda: store.save(chat_of())):
            with pytest.raises(UsageError, match="is not a regular file"):
                use()
        assert (store.directory / "precious").read_text() == "precious"

    def test_a_full_disk_leaves_the_chats_as_they_were(self, store):
        saved = store.save(chat_of())
        longer = chat_of(messages=(Message("user", "x" * 1_000_000),), revision=saved.revision)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(ResourceError, match="the chat cannot be saved"):
                store.save(longer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert store.load(ID) == saved
        store.save(longer)

    def test_a_file_in_the_directorys_place_is_a_clear_error(self, store):
        store.directory.parent.mkdir()
        store.directory.write_text("")
        with pytest.raises(UsageError, match="cannot be saved"):
            store.save(chat_of())

    def test_a_session_that_is_suspended_while_it_saves_is_named(self, store, monkeypatch):
        monkeypatch.setattr("mixchat.chat.saved.chat_store._LOCK_TIMEOUT_S", 0)
        store.save(chat_of())
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ResourceError, match="database is locked"):
            store.save(chat_of())
        assert store.load(ID) == chat_of()
        other.close()

    def test_a_kill_loses_nothing_that_was_saved(self, tmp_path):
        code = (
            "import sys, chat_files as c\n"
            "from pathlib import Path\n"
            "from mixchat.chat.saved.chat_store import ChatStore\n"
            "from mixchat.text.messages import Message\n"
            "store, turns, saved = ChatStore(Path(sys.argv[1])), (), c.chat_of(messages=())\n"
            "while True:\n"
            "    turns += (Message('user', 'x' * 5000),)\n"
            "    saved = store.save(c.chat_of(messages=turns, revision=saved.revision))\n"
            "    print(len(turns), flush=True)\n"
        )
        for kill in range(5):
            store = ChatStore(tmp_path / str(kill))
            command = [sys.executable, "-c", code, str(store.directory)]
            path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
            ) as process:
                for _ in range(1 + 7 * kill):
                    said = int(process.stdout.readline())
                process.send_signal(signal.SIGKILL)
            assert len(store.load(ID).messages) >= said


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"{" + bytes(100_000),
            lambda data: data[:100] + bytes(len(data) - 100),
            lambda data: data[: len(data) // 2],
            lambda data: data.replace(b'[{"role"', b'[{"rule"'),
            lambda data: data.replace(b"2026-11-25T", b"2026-99-25T"),
        ],
    )
    def test_a_damaged_file_is_one_clear_line_and_stays(self, store, damage):
        store.save(chat_of(messages=(*TALK, Message("user", "x" * 20_000))))
        damaged = damage(store.path.read_bytes())
        store.path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            store.load(ID)
        assert str(store.path) in str(caught.value)
        assert store.path.read_bytes() == damaged

    @pytest.mark.parametrize("change", ["PRAGMA user_version = 2", "PRAGMA user_version = 0"])
    def test_a_newer_version_is_said_and_its_chats_stay(self, store, change):
        store.save(chat_of())
        with sqlite3.connect(store.path) as database:
            database.execute(change)
        database.close()
        before = store.path.read_bytes()
        for use in (store.all, lambda: store.save(chat_of()), lambda: store.remove(ID)):
            with pytest.raises(CheckpointError, match="another version of mixchat"):
                use()
        assert store.path.read_bytes() == before

    @given(st.integers(0), st.binary(min_size=1, max_size=40))
    @settings(max_examples=150)
    def test_whatever_bytes_are_changed_no_error_is_python_s(self, at, data):
        with tempfile.TemporaryDirectory() as directory:
            store = ChatStore(Path(directory))
            store.save(chat_of(name="sky"))
            whole = bytearray(store.path.read_bytes())
            at %= len(whole)
            whole[at : at + len(data)] = data
            store.path.write_bytes(whole)
            for use in (store.all, lambda: store.load(ID), lambda: store.all("x")):
                with suppress(CheckpointError, ChatNotFoundError, ResourceError, UsageError):
                    use()


class TestFinding:
    def test_an_id_is_the_local_time_and_a_drawn_tail(self):
        assert re.fullmatch(r"\d{8}-\d{4}-[a-z0-9]{3}", new_id(BEGAN))
        assert new_id(BEGAN).startswith(f"{BEGAN.astimezone():%Y%m%d-%H%M}")
        assert len({new_id(BEGAN) for _ in range(9)}) > 1

    @pytest.mark.parametrize(
        "wanted", ["20261125-1630-k3f", "20261125-1630-K3", " 20261125-1630-k3"]
    )
    def test_any_beginning_that_no_other_has_will_do(self, three, wanted):
        assert three.load(wanted).id == "20261125-1630-k3f"

    def test_a_beginning_of_several_lists_them(self, three):
        with pytest.raises(
            ChatNotFoundError, match="2 chats: 20261125-1630-k3f, 20261125-1630-k4f"
        ):
            three.load("20261125")

    @pytest.mark.parametrize("wanted", ["", "../x", f"../{ID}", f"{ID}/../x", "%", "sea\ud83d"])
    def test_what_means_no_chat_is_not_found(self, three, wanted):
        for find in (three.load, three.remove):
            with pytest.raises(ChatNotFoundError):
                find(wanted)

    def test_near_misses_are_named(self, three):
        three.save(three.load("20261124"), "Holiday plans")
        for wanted, hint in (
            ("Holiday plan", "Did you mean Holiday plans?"),
            ("x", "mixchat chats"),
        ):
            with pytest.raises(ChatNotFoundError) as caught:
                three.load(wanted)
            assert hint in caught.value.hint

    def test_the_last_is_the_one_saved_last_that_has_a_turn(self, three, tmp_path):
        three.save(chat_of("20261126-0000-aaa", (), updated=BEGAN + timedelta(days=9)))
        assert three.load("last").id == "20261124-0900-abc"
        with pytest.raises(ChatNotFoundError):
            ChatStore(tmp_path / "none").load("last")

    def test_a_text_is_found_wherever_it_stands(self, three):
        three.save(three.load("20261124"), "Äpfel 100%")
        three.save(chat_of("20261126-0000-aaa", system="100% apples"))
        ids = {text: [chat.id[-3:] for chat in three.all(text)] for text in ("äPFEL", "0%", "sky")}
        assert ids == {"äPFEL": ["abc"], "0%": ["abc", "aaa"], "sky": ["abc", "k4f", "k3f", "aaa"]}
        long = (Message("user", f"{'a ' * 99}\nneedle{' b' * 999}"),)
        three.save(chat_of("20261127-0000-aaa", long))
        (found,) = three.all("Needle")
        assert re.fullmatch("( ?a)+ needle( b)+ ?b?", found.question)
        assert len(found.question) <= 200


class TestNames:
    @pytest.mark.parametrize(
        "name", ["sky", "2026 plans", "20261125-1630-k3f2", "天気 😀", "x" * 80]
    )
    def test_what_can_be_a_name(self, store, name):
        assert checked_name(f"  {name} ") == name
        assert store.save(chat_of(), f" {name}") == store.load(name)

    @pytest.mark.parametrize(
        "name",
        ["  ", "a\nb", "a\x1b[2J", "a\u2028b", "x" * 81, "2026", "20261125-", ID.upper(), "-x"],
    )
    def test_what_cannot(self, store, name):
        with pytest.raises(UsageError, match="the chat's name"):
            store.save(chat_of(), name)
        assert store.all() == []

    def test_a_name_that_another_chat_has_is_refused(self, three):
        first, second = three.load("20261124"), three.load(ID)
        three.save(first, "sky")
        with pytest.raises(UsageError, match="20261124-0900-abc already has the name 'sky'"):
            three.save(second, "sky ")
        assert three.load(ID).name is None

    def test_a_chat_may_keep_and_change_its_name(self, store):
        chat = store.save(chat_of(), "sky")
        chat = store.save(chat, "sky")
        assert chat == store.load("sky")
        chat = store.save(chat, "sea")
        assert store.load(ID) == chat == store.load("sea")
        with pytest.raises(ChatNotFoundError):
            store.load("sky")


def test_a_summary_says_what_it_is_about(store):
    store.save(chat_of(name="sky", messages=(Message("user", " a\n  b " + "x" * 999), *TALK)))
    (summary,) = store.all()
    assert (summary.id, summary.name, summary.model) == (ID, "sky", "instruct")
    assert (summary.created, summary.updated, summary.turns) == (BEGAN, BEGAN, 3)
    assert summary.question.startswith("a b xxx")
    assert len(summary.question) == 200


class TestCaches:
    def test_its_kv_cache_goes_with_a_chat(self, three):
        three.kv_path(ID).write_bytes(b"x")
        assert three.remove("20261125-1630-k3") == ID
        assert not three.kv_path(ID).exists()
        assert [chat.id[-3:] for chat in three.all()] == ["abc", "k4f"]

    def test_the_sweep_takes_old_leftovers_and_nothing_else(self, three):
        before = sorted(os.listdir(three.directory))
        names = ["20261120-0000-aaa.kv", f"{ID}.kv.x1.mixchat.tmp"]
        foreign = ["notes.tmp", "thesis.kv", f"{ID}-x.kv", f"{ID}.mine.kv", f"{ID}.kv.notes"]
        for name in [*names, f"{ID}.kv", *foreign]:
            (three.directory / name).write_bytes(b"xyz")
        assert list(three.sweep()) == []  # somebody may be writing them
        for path in three.directory.iterdir():
            os.utime(path, (0, 0))
        assert sorted(three.sweep()) == sorted((three.directory / name, 3) for name in names)
        assert sorted(os.listdir(three.directory)) == sorted([*before, f"{ID}.kv", *foreign])


def test_the_store_is_in_the_data_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert ChatStore().path == tmp_path / "chats" / "chats.db"
