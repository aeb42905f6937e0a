"""Chat with a mixture-of-experts model that is larger than the machine's memory.

`load` gives a `Model`. `model.chat("Hi").text()` is an answer. `chat`, `achat` and `generate` also
yield events, of which the last is `End`:

>>> import mixchat
>>> with mixchat.load("demo", context_size=512) as model:
...     for event in model.chat("Hi", temperature=0):
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

    from mixchat.base.errors import CutOffError, MixchatError
    from mixchat.face.events import End, LeftOut, Piece, Reading, ToolResult
    from mixchat.face.load import load
    from mixchat.face.model import Model
    from mixchat.face.model_answer import AsyncAnswer, ModelAnswer
    from mixchat.face.request import Request
    from mixchat.text.messages import Message

__version__ = "0.1.0"
__all__ = [
    "AsyncAnswer",
    "CutOffError",
    "End",
    "LeftOut",
    "Message",
    "MixchatError",
    "Model",
    "ModelAnswer",
    "Piece",
    "Reading",
    "Request",
    "ToolResult",
    "load",
]
_MODULES = {
    "load": "face.load",
    "Model": "face.model",
    "Request": "face.request",
    "Message": "text.messages",
    **dict.fromkeys(("CutOffError", "MixchatError"), "base.errors"),
    **dict.fromkeys(("AsyncAnswer", "ModelAnswer"), "face.model_answer"),
    **dict.fromkeys(("End", "LeftOut", "Piece", "Reading", "ToolResult"), "face.events"),
}


def __getattr__(name: str) -> "Any":
    """Import a name when it is first used, because torch takes a second."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'mixchat' has no attribute {name!r}")
    return getattr(import_module(f"mixchat.{_MODULES[name]}"), name)
