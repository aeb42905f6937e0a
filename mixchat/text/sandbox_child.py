"""The inside of a sandbox, which serves its parent, and the service for a checkpoint's text.

The parent is at the other end of the socket on standard input. This process does not import torch,
and it ends when the socket is closed.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixchat.base.errors import MixchatError, short_message
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.messages import from_parts
from mixchat.text.sandbox_protocol import MAX_MEMORY, receive, to_frame
from mixchat.text.template import Template
from mixchat.text.tokenizer import Tokenizer
from mixchat.text.tool_call import Tool

_LIBRARIES = ("jinja2.ext", "jinja2.sandbox", "sentencepiece", "tokenizers")
_LIMITS = {  # the child may write no file and start no process
    resource.RLIMIT_AS: MAX_MEMORY,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NPROC: 0,
}


def main(directory: str) -> None:
    """Run the text of the checkpoint in `directory`."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    serve(_CheckpointService(Path(directory)))


def serve(service: object) -> None:
    """Call the service's methods for the parent, until the parent is gone.

    Import libraries before, while Python can still write the .pyc files.
    """
    for limit, most in _LIMITS.items():
        with suppress(ValueError, OSError):  # macOS does not know every limit
            resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the timer ends the process in any code
    os.set_blocking(2, False)  # pages of errors must not wait for a reader
    with socket.socket(fileno=0) as channel, suppress(EOFError, OSError):
        while True:
            seconds, (method, *arguments) = receive(channel), receive(channel)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                reply = to_frame({"value": getattr(service, method)(*arguments)})
            except BaseException as error:  # a panic inside the package tokenizers, too
                is_ours = isinstance(error, MixchatError)
                text = str(error) if is_ours else short_message(error)
                hint = getattr(error, "hint", None) if is_ours else None
                reply = to_frame({"error": type(error).__name__, "text": text, "hint": hint})
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(reply)


class _CheckpointService:
    """The methods that a call can name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Tokenizer
        self._template: Template

    def load_tokenizer(self) -> object:
        self._tokenizer = tokenizer = load_tokenizer(self._directory)
        names = ("vocab_size", "bos_id", "eos_id", "adds_bos")
        facts = {name: getattr(tokenizer, name) for name in names}
        facts["control_tokens"] = dict(tokenizer.control_tokens)
        tokens = tokenizer.token_bytes  # Latin-1 has a character for each byte
        facts["within"] = [data.decode("latin-1") for data in tokens.within]
        for name, by_id in (("first", tokens.first), ("names", tokens.names)):
            facts[name] = [[token, data.decode("latin-1")] for token, data in by_id.items()]
        return facts

    def load_template(self) -> object:
        self._template = template = load_template(self._directory, self._tokenizer)
        stop_ids = sorted(template.stop_ids)
        form = template.thinking
        return {
            "continues_prompt": template.continues_prompt,
            "stop_ids": stop_ids,
            "thinking": None if form is None else [form.kind, *form.variables],
            "tools": None if template.tools is None else template.tools.name,
        }

    def encode(self, text: str) -> object:
        return self._tokenizer.encode(text)

    def encode_template(self, text: str, inserts: Mapping[str, Any]) -> object:
        tuples = {key: v if isinstance(v, str) else tuple(v) for key, v in inserts.items()}
        return self._tokenizer.encode_template(text, tuples)

    def encode_messages(
        self,
        messages: Sequence[Sequence[Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> object:
        offered = [Tool(**tool) for tool in tools]
        return self._template.encode(list(map(from_parts, messages)), variables, offered)
