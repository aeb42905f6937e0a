"""Saved chats: what is saved comes back, what is damaged is refused, nothing is half-written."""

import errno
import os
import re
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta, timezone
from pathlib import Path

import pytest
from chat_files import BEGAN, ID, TALK, chat_of, file_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixchat.base.errors import ChatNotFoundError, ResourceError, UsageError
from mixchat.chat.saved.chat_file import checked_name
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.text.messages import Message


@pytest.fixture
def three(store):
    """Chats of two days; the one that began first was used last."""
    used = {"20261124-0900-abc": 9, "20261125-1630-k3f": 1, "20261125-1630-k4f": 2}
    for id, hours in used.items():
        store.save(chat_of(id, updated=BEGAN + timedelta(hours=hours)))
    return store


class TestRoundTrip:
    def test_all_of_a_chat_comes_back(self, store):
        chat = chat_of(name="sky", system="Be brief.\n", updated=BEGAN + timedelta(minutes=3))
        store.save(chat)
        assert store.load(ID) == chat

    def test_a_time_of_another_zone_comes_back_as_the_same_moment_in_utc(self, store):
        zone = timezone(timedelta(hours=5, minutes=30))
        store.save(chat_of(created=BEGAN.astimezone(zone)))
        assert store.load(ID).created == BEGAN
        assert store.load(ID).created.utcoffset() == timedelta(0)

    # Two halves that were never joined must not come back as one character.
    @example("\ud83d\ude00 \udcff \0 \r\n \u2028")
    @given(st.text(st.characters(exclude_categories=())))
    @settings(max_examples=50)
    def test_every_text_comes_back_even_what_utf8_cannot_say(self, text):
        with tempfile.TemporaryDirectory() as directory:
            store = ChatStore(Path(directory))
            chat = chat_of(messages=(Message("user", text),), system=text, model=text)
            store.save(chat)
            assert store.load(ID) == chat

    def test_what_json_has_no_word_for_is_not_written(self, store):
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.save(chat_of(sampling={"temperature": float("nan")}))
        assert not file_of(store).exists()


class TestFiles:
    def test_only_the_owner_can_read_whatever_the_umask(self, store):
        before = os.umask(0)
        try:
            store.save(chat_of())
        finally:
            os.umask(before)
        assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(file_of(store).stat().st_mode) == 0o600

    def test_a_link_in_its_place_is_neither_written_through_nor_replaced(self, store, tmp_path):
        precious = tmp_path / "precious"
        precious.write_text("precious")
        store.directory.mkdir(parents=True)
        file_of(store).symlink_to(precious)
        saved = store.save(chat_of())
        assert precious.read_text() == "precious"
        assert (saved.id != ID, store.load(saved.id)) == (True, saved)

    def test_a_full_disk_leaves_the_chat_as_it_was(self, store, monkeypatch):
        store.save(chat_of())

        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(ResourceError, match="cannot be saved"):
                store.save(chat_of(messages=()), chat_of())
        assert store.load(ID) == chat_of()
        assert os.listdir(store.directory) == [f"{ID}.json"]

    def test_a_file_in_the_directorys_place_is_a_clear_error(self, store):
        store.directory.parent.mkdir()
        store.directory.write_text("")
        with pytest.raises(UsageError, match="cannot be saved"):
            store.save(chat_of())

    @pytest.mark.parametrize(
        "id", ["", "../x", f"../{ID}", f"{ID}/../x", f"{ID}\n", "sky", "x" * 9]
    )
    def test_a_text_that_is_not_an_id_names_no_file(self, store, id):
        for use in (store.kv_path, lambda id: store.save(chat_of(id))):
            with pytest.raises(UsageError, match="not a chat's ID"):
                use(id)
        for find in (store.load, store.remove):
            with pytest.raises(ChatNotFoundError):
                find(id)

    def test_a_chat_is_whole_at_every_moment(self, store):
        one, two = (chat_of(messages=(Message("user", name * 50_000),) * 4) for name in "ab")
        store.save(one)

        def save_often():
            for _ in range(20):
                store.save(two, one)
                store.save(one, two)

        with ThreadPoolExecutor() as pool:
            writing = pool.submit(save_often)
            while not writing.done():
                assert store.load(ID) in (one, two)
        assert writing.result() is None
        assert os.listdir(store.directory) == [f"{ID}.json"]


class TestFinding:
    def test_an_id_is_the_local_time_and_a_drawn_tail(self, store):
        id = store.new_id(BEGAN)
        assert re.fullmatch(r"\d{8}-\d{4}-[a-z0-9]{3}", id)
        assert id.startswith(f"{BEGAN.astimezone():%Y%m%d-%H%M}")
        assert len({store.new_id(BEGAN) for _ in range(9)}) > 1
        store.save(chat_of(id))
        assert store.load(id).id == id

    def test_a_new_id_is_none_that_a_chat_has(self, store, monkeypatch):
        store.save(chat_of(f"{BEGAN.astimezone():%Y%m%d-%H%M}-aaa"))
        drawn = iter("aaaaab")
        monkeypatch.setattr(
            "mixchat.chat.saved.chat_store.secrets.choice", lambda letters: next(drawn)
        )
        assert store.new_id(BEGAN).endswith("-aab")

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

    def test_near_misses_are_named(self, three):
        three.rename(three.load("20261124"), "Holiday plans")
        for wanted, hint in (
            ("Holiday plan", "Did you mean Holiday plans?"),
            ("x", "mixchat chats"),
        ):
            with pytest.raises(ChatNotFoundError) as caught:
                three.load(wanted)
            assert hint in caught.value.hint

    def test_the_latest_is_the_one_saved_last(self, three, tmp_path):
        assert three.latest().id == three.load("last").id == "20261124-0900-abc"
        with pytest.raises(ChatNotFoundError):
            ChatStore(tmp_path / "none").latest()


class TestNames:
    @pytest.mark.parametrize(
        "name", ["sky", "2026 plans", "20261125-1630-k3f2", "天気 😀", "x" * 80]
    )
    def test_what_can_be_a_name(self, name):
        assert checked_name(f"  {name} ") == name

    @pytest.mark.parametrize(
        "name",
        ["  ", "a\nb", "a\x1b[2J", "a\u2028b", "x" * 81, "2026", "20261125-", ID.upper(), "-x"],
    )
    def test_what_cannot(self, store, name):
        with pytest.raises(UsageError, match="the chat's name"):
            store.save(chat_of(name=name))
        assert store.all() == []

    def test_a_name_that_another_chat_has_is_refused(self, three):
        first, second = three.load("20261124"), three.load(ID)
        three.rename(first, "sky")
        with pytest.raises(UsageError, match="20261124-0900-abc already has the name 'sky'"):
            three.rename(second, "sky ")
        assert three.load(ID).name is None

    def test_a_chat_may_keep_and_change_its_name(self, store):
        chat = store.rename(chat_of(), "sky")
        assert store.rename(chat, "sky") == chat == store.load("sky")
        chat = store.rename(chat, "sea")
        assert store.load(ID) == chat == store.load("sea")
        with pytest.raises(ChatNotFoundError):
            store.load("sky")


class TestNamesAlone:
    def test_they_are_known_by_the_beginnings_of_the_files(self, three):
        """A completion reads no whole chat: one of ten megabytes takes a second."""
        three.rename(three.load(ID), "x" * 80)
        three.rename(three.load("20261124"), '"天気" \\ ' + "😀" * 70)
        file_of(three, "20261125-1630-k4f").write_bytes(b"")
        assert three.names() == ["x" * 80, '"天気" \\ ' + "😀" * 70]
        with open(file_of(three), "r+b") as file:
            file.truncate(1024)
        assert len(three.names()) == 2

    @pytest.mark.parametrize(
        "head", [b"", b"[]", b'{"name": "x"}', b'{"format": 1, "name": "a\\u001b"', b"\xff" * 99]
    )
    def test_a_file_that_is_not_a_chat_has_none(self, three, head):
        for id in three.ids():
            file_of(three, id).write_bytes(head)
        assert three.names() == []


class TestAll:
    def test_a_summary_says_what_it_is_about(self, store):
        store.save(chat_of(name="sky", messages=(Message("user", " a\n  b " + "x" * 999), *TALK)))
        (summary,) = store.all()
        assert (summary.id, summary.name, summary.model) == (ID, "sky", "instruct")
        assert (summary.created, summary.updated, summary.turns) == (BEGAN, BEGAN, 3)
        assert summary.question.startswith("a b xxx")
        assert len(summary.question) == 200

    def test_a_damaged_file_does_not_hide_the_others_of_which_the_newest_is_first(self, three):
        file_of(three).write_bytes(b"{")
        os.utime(file_of(three), (0, 0))
        *whole, damaged = three.all()
        assert [chat.id for chat in whole] == ["20261124-0900-abc", "20261125-1630-k4f"]
        assert damaged.id == ID
        assert f"{file_of(three)} is damaged" in damaged.problem

    def test_what_is_not_ours_is_not_listed(self, three):
        (three.directory / "notes.json").write_text("{}")
        (three.directory / f"{ID}.kv").write_text("")
        (three.directory / f"{ID}-copy.json").write_text("{}")
        (three.directory / "20261125-1630-dir.json").mkdir()
        os.mkfifo(three.directory / "20261125-1630-pip.json")
        assert len(three.all()) == 3


class TestRemoving:
    def test_its_kv_cache_goes_with_a_chat(self, three):
        assert three.kv_path(ID) == three.directory / f"{ID}.kv"
        three.kv_path(ID).write_bytes(b"x")
        assert three.remove("20261125-1630-k3") == ID
        assert sorted(os.listdir(three.directory)) == [
            "20261124-0900-abc.json",
            "20261125-1630-k4f.json",
        ]

    def test_a_damaged_chat_can_be_removed(self, three):
        file_of(three).write_bytes(b"\xff")
        three.remove(ID)
        assert len(three.all()) == 2

    def test_what_cannot_be_removed_is_a_clear_error(self, three, monkeypatch):
        def refuse(path, missing_ok=False):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(UsageError, match="cannot be removed"):
            three.remove(ID)

    def test_the_sweep_takes_old_leftovers_and_nothing_else(self, three):
        before = sorted(os.listdir(three.directory))
        names = ["20261120-0000-aaa.kv", *(f"{ID}.{end}.x1.mixchat.tmp" for end in ("json", "kv"))]
        foreign = ["notes.tmp", "thesis.kv", f"{ID}-notes.tmp", f"{ID}-x.kv", f"{ID}.mine.kv"]
        for name in [*names, f"{ID}.kv", *foreign]:
            (three.directory / name).write_bytes(b"xyz")
        assert list(three.sweep()) == []  # somebody may be writing them
        for path in three.directory.iterdir():
            os.utime(path, (0, 0))
        assert sorted(three.sweep()) == sorted((three.directory / name, 3) for name in names)
        assert sorted(os.listdir(three.directory)) == sorted([*before, f"{ID}.kv", *foreign])
