"""A store of chats for the tests of this folder."""

import pytest

from mixchat.chat.saved.chat_store import ChatStore


@pytest.fixture
def store(tmp_path):
    return ChatStore(tmp_path / "home" / "chats")
