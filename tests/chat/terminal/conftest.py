"""Fixtures of the tests of a chat's commands."""

import pytest

from mixchat.chat.saved.chat_store import ChatStore


@pytest.fixture
def store(tmp_path):
    return ChatStore(tmp_path / "chats")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The working directory is one of the test's own."""
    monkeypatch.chdir(tmp_path)
