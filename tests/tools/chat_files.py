"""A chat to save."""

from datetime import UTC, datetime

from mixchat.chat.saved.saved_chat import SavedChat
from mixchat.text.messages import Message

BEGAN = datetime(2026, 11, 25, 16, 30, 1, 5, tzinfo=UTC)
ID = "20261125-1630-k3f"
TALK = (
    Message("user", "Why is the sky blue?"),
    Message("assistant", "Rayleigh.", (1, 5, 31999), False, "Hm.", 1),
    Message("user", "Go on"),
    Message("assistant", "Wave", None, partial=True),
)
SAMPLING = {"temperature": 0.7, "top_k": 0, "repeat_penalty": 1.1}


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
