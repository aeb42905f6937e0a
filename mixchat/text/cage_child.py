"""The inside of the cage: runs a checkpoint's tokenizer and template for its parent.

The parent is at the other end of the socket on standard input. This process imports no torch, and
ends when that socket does.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError, PromptError
from mixchat.text.frames import pack, receive
from mixchat.text.limits import BYTES
from mixchat.text.messages import Message, Template
from mixchat.text.template import load_template
from mixchat.text.tokenizer import Tokenizer, load_tokenizer
from mixchat.text.tokenizer_files import on_one_line

_LIBRARIES = (
    *("jinja2.ext", "jinja2.sandbox", "sentencepiece", "tokenizers"),
    *("mixchat.text.hf", "mixchat.text.spm"),
)
_LIMITS = {"RLIMIT_AS": BYTES, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0}


def main() -> None:
    """Serve until the parent is gone."""
    _import_libraries()
    _limit_itself()
    served = _Served(Path(sys.argv[-1]))
    with socket.socket(fileno=0) as channel, suppress(EOFError, OSError):
        while True:
            seconds, (method, *arguments) = receive(channel), receive(channel)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = _reply(getattr(served, method), arguments)
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(reply)


class _Served:
    """The requests that are served, by the names of the methods."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Tokenizer
        self._template: Template

    def load_tokenizer(self) -> object:
        self._tokenizer = made = load_tokenizer(self._directory)
        names = ("vocab_size", "bos_id", "eos_id", "adds_bos")
        facts = {name: getattr(made, name) for name in names}
        return {**facts, "control_tokens": dict(made.control_tokens)}

    def load_template(self) -> object:
        self._template = made = load_template(self._directory, self._tokenizer)
        return {"continues_prompt": made.continues_prompt, "stop_ids": sorted(made.stop_ids)}

    def encode(self, text: str) -> object:
        return self._tokenizer.encode(text)

    def encode_template(self, text: str, inserts: Mapping[str, Any]) -> object:
        ready = {key: v if isinstance(v, str) else tuple(v) for key, v in inserts.items()}
        return self._tokenizer.encode_template(text, ready)

    def decode(self, ids: Sequence[int]) -> object:
        return self._tokenizer.decode(ids)

    def encode_messages(self, messages: Sequence[Sequence[Any]]) -> object:
        return self._template.encode(
            [
                Message(role, text, ids if ids is None else tuple(ids))
                for role, text, ids in messages
            ]
        )


def _reply(method: Callable[..., object], arguments: Sequence[Any]) -> bytes:
    """Return what a method gives, or what it failed with."""
    try:
        return pack({"value": method(*arguments)})
    except (CheckpointError, PromptError) as error:
        return pack({"error": type(error).__name__, "text": str(error), "hint": error.hint})
    except BaseException as error:  # A panic inside the package tokenizers is no Exception.
        return pack({"error": type(error).__name__, "text": on_one_line(error)})


def _import_libraries() -> None:
    """Import before the limits hold, so that Python can keep what it has compiled."""
    for name in _LIBRARIES:
        importlib.import_module(name)


def _limit_itself() -> None:
    """Give up what a tokenizer has no use for. macOS does not know every limit."""
    for name, most in _LIMITS.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the timer's: ends it, whatever code runs
    os.set_blocking(2, False)  # who writes pages of errors must not wait for a reader
