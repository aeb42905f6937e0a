"""Saved chats that are damaged: each is a clear error."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from chat_files import ID, chat_of, file_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixchat.base.errors import CheckpointError
from mixchat.chat.saved.chat_store import ChatStore


def edit(store, **values):
    raw = json.loads(file_of(store).read_bytes())
    file_of(store).write_text(json.dumps(raw | values))


VALUES = [
    *(("format", None), ("format", "1"), ("more", 1), ("system", ["x"])),
    *(("name", 1), ("name", " spaces "), ("name", "2026"), ("model", None), ("identity", 7)),
    *(("created", None), ("created", "yesterday"), ("created", "2026-11-25T16:30:00")),
    *(("created", "2026-11-25T16:30:00+02:00"), ("updated", "0001-01-01T00:00:00+00:00")),
    *(("updated", "9999-12-31T23:59:59+00:00"), ("sampling", None), ("sampling", {"top_k": "40"})),
    *(("sampling", {"top_k": float("inf")}), ("sampling", {"top_k": 10**400}), ("messages", {})),
    *(("messages", [{"role": "user"}]), ("messages", [{"role": "system", "content": "x"}])),
    ("messages", [{"role": "user", "content": None}]),
    *(
        ("messages", [{"role": "user", "content": "x", **more}])
        for more in (
            *({"ids": [1.0]}, {"ids": [-1]}, {"partial": 1}, {"thinking": 1}, {"more": 1}),
            *({"thinking_tokens": -1}, {"thinking_tokens": True}),
        )
    ),
]


class TestDamage:
    @pytest.mark.parametrize(("key", "value"), VALUES)
    def test_a_value_of_a_wrong_kind_is_damage(self, store, key, value):
        store.save(chat_of())
        edit(store, **{key: value})
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            store.load(ID)
        assert str(file_of(store)) in str(caught.value)
        assert caught.value.hint == f"To remove it: mixchat chats --rm {ID}"

    def test_what_is_missing_is_damage(self, store):
        store.save(chat_of())
        whole = json.loads(file_of(store).read_bytes())
        for key in whole:
            file_of(store).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
            with pytest.raises(CheckpointError, match="is damaged"):
                store.load(ID)

    def test_another_version_is_said_to_be_one(self, store):
        store.save(chat_of())
        edit(store, format=2, more="than we know")
        with pytest.raises(CheckpointError, match="another version of mixchat") as caught:
            store.load(ID)
        assert "--rm" not in caught.value.hint

    def test_a_file_cut_off_anywhere_is_damage(self, store):
        store.save(chat_of())
        whole = file_of(store).read_bytes()
        for length in range(len(whole)):
            file_of(store).write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="is damaged"):
                store.load(ID)

    @example(b"[" * 100_000)
    @example(b"\xef\xbb\xbf{}")
    @example(b"1" * 5000)
    @given(
        st.binary(max_size=60)
        | st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(lambda value: json.dumps(value).encode())
    )
    @settings(max_examples=100)
    def test_whatever_bytes_a_file_has_it_is_refused(self, data):
        with tempfile.TemporaryDirectory() as directory:
            store = ChatStore(Path(directory))
            file_of(store).write_bytes(data)
            with pytest.raises(CheckpointError, match="is damaged"):
                store.load(ID)
            assert store.all()[0].problem

    # Every key is there, one of them with any value: it is refused, or it can be saved again.
    @given(
        key=st.sampled_from(["name", "model", "created", "system", "sampling", "messages"]),
        value=st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.datetimes(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "ids", "partial"]), inner)
            ),
        ),
    )
    @settings(max_examples=150)
    def test_what_is_read_can_be_saved(self, key, value):
        with tempfile.TemporaryDirectory() as directory:
            store = ChatStore(Path(directory))
            store.save(chat_of())
            raw = json.loads(file_of(store).read_bytes()) | {key: value}
            file_of(store).write_text(json.dumps(raw, default=str))
            try:
                chat = store.load(ID)
            except CheckpointError:
                return
            assert store.save(chat, chat) == chat == store.load(ID)

    def test_one_that_cannot_be_read_is_a_clear_error(self, store, monkeypatch):
        store.save(chat_of())

        def refuse(path, flags, mode=0o777):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match="cannot be read"):
            store.load(ID)


def test_the_store_is_in_the_data_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert ChatStore().directory == tmp_path / "chats"
