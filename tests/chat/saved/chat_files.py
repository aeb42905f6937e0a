"""A chat to save, and the path of its file."""

from datetime import datetime, timezone

from mixchat.chat.saved.chat_file import SavedChat
from mixchat.text.messages import Message

BEGAN = datetime(2026, 11, 25, 16, 30, 1, 5, tzinfo=timezone.utc)
ID = "20261125-1630-k3f"
TALK = (
    Message("user", "Why is the sky blue?"),
    Message("assistant", "Rayleigh.", (1, 5, 31999), False, "Hm.", 1),
    Message("user", "Go on"),
    Message("assistant", "Wave", None, partial=True),
)
SAMPLING = {"temperature": 0.7, "top_k": 0, "seed": None, "repeat_penalty": 1.1}


def chat_of(id=ID, messages=TALK, **other):
    usual = {
        "name": None,
        "model": "instruct",
        "identity": "c0ffee",
        "created": BEGAN,
        "updated": BEGAN,
        "system": None,
        "sampling": SAMPLING,
    }
    return SavedChat(id=id, messages=messages, **(usual | other))


def file_of(store, id=ID):
    return store.directory / f"{id}.json"
