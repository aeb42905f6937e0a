"""Chat with a mixture-of-experts model that is larger than the machine's memory.

`load` gives a `Model`. Its `chat` and `generate` yield events, of which the last is `End`:

>>> import mixchat
>>> with mixchat.load("demo", context_size=512) as model:
...     for event in model.chat([{"role": "user", "content": "Hi"}], temperature=0):
...         if isinstance(event, mixchat.Piece):
...             print(event.text, end="")
...         elif isinstance(event, mixchat.End):
...             print(" -", event.reason, event.stats.generated_tokens)

CONTRIBUTING shows the rooms, which are the folders here, and how data passes through them.
"""

# Nothing is imported here, because __main__ has to answer Ctrl-C before that.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mixchat.base.errors import MixchatError
    from mixchat.face.events import End, LeftOut, Piece, Reading
    from mixchat.face.load import load
    from mixchat.face.model import Model
    from mixchat.face.request import Request
    from mixchat.text.messages import Message

__version__ = "0.1.0"
__all__ = [
    "End",
    "LeftOut",
    "Message",
    "MixchatError",
    "Model",
    "Piece",
    "Reading",
    "Request",
    "load",
]
_MODULES = {
    "load": "face.load",
    "Model": "face.model",
    "Request": "face.request",
    "Message": "text.messages",
    "MixchatError": "base.errors",
    **dict.fromkeys(("End", "LeftOut", "Piece", "Reading"), "face.events"),
}


def __getattr__(name: str) -> "Any":
    """Import a name when it is first used, because torch takes a second."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'mixchat' has no attribute {name!r}")
    return getattr(import_module(f"mixchat.{_MODULES[name]}"), name)
