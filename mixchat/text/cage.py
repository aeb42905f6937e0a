"""A process of its own for a checkpoint's tokenizer and template, which are foreign programs.

A chat template and a tokenizer.json can loop, grow without end or abort, and no list of bans will
hold them. So they run in a child process with limits of memory, time and output (`limits`), and
whatever they do ends as one `CheckpointError`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError, PromptError
from mixchat.text.frames import pack, receive
from mixchat.text.limits import BYTES, TEXT, patience, seconds
from mixchat.text.tokenizer_files import on_one_line

# -I: nothing in the current directory is imported, and no variable of Python's counts.
_COMMAND = (
    *("-I", "-c"),
    "import sys; sys.path[:] = sys.argv[1:-1]; from mixchat.text.cage_child import main; main()",
)
# One thread is enough, and each has address space of its own.
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}


@dataclass(frozen=True)
class Request:
    """One thing to be done in the cage, and what is to blame where that fails."""

    blame: str
    method: str
    arguments: tuple[object, ...] = ()


class Cage:
    """Asks the child one thing at a time. One that was killed is started again when needed."""

    def __init__(self, directory: Path, opening: Sequence[Request]) -> None:
        """Start the child for the checkpoint in `directory`, and do not wait for it.

        `opening` is what each child has to do before anything else.
        """
        self._directory, self._opening = directory, opening
        self._lock = threading.Lock()
        self._child: _Child | None = _Child(directory, opening)

    def opened(self) -> Sequence[Any]:
        """Return what the opening requests gave. Raises `CheckpointError`."""
        with self._lock:
            try:
                return self._opened().facts
            except BaseException:
                self.close()
                raise

    def ask(self, request: Request) -> Any:
        """Return what a request gives. Raises `CheckpointError` or `PromptError`."""
        packed = _packed(request)
        with self._lock:
            try:
                reply = self._opened().ask(request, packed)
            except BaseException:
                # After Ctrl-C too: the reply would come when another one is waited for.
                self.close()
                raise
        return _value(reply, request.blame)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _opened(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._directory, self._opening)
        child = self._child
        for request in self._opening[len(child.facts) :]:
            reply = child.reply(request, seconds(request.method, 0))
            child.facts.append(_value(reply, request.blame))
        return child


class _Child:
    """The process, from its start to its end."""

    def __init__(self, directory: Path, opening: Sequence[Request]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *_COMMAND, *sys.path, str(directory)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | _VARIABLES,
                start_new_session=True,  # Ctrl-C is not for it
            )
        self.facts: list[Any] = []
        self._process, self._channel = process, ours
        self.end = weakref.finalize(self, _end, process, ours)
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        for request in opening:
            self._send(_packed(request), seconds(request.method, 0))

    def ask(self, request: Request, packed: bytes) -> Any:
        """The reply to a request. Raises `CheckpointError` where the child is gone after it."""
        allowed = seconds(request.method, len(packed))
        self._send(packed, allowed)
        return self.reply(request, allowed)

    def _send(self, packed: bytes, allowed: float) -> None:
        self._channel.settimeout(patience(allowed))
        with suppress(OSError):  # that it is gone is said when a reply is waited for
            self._channel.sendall(pack(allowed) + packed)

    def reply(self, request: Request, allowed: float) -> Any:
        """The next reply, which is to `request`; that may compute for `allowed` seconds."""
        try:
            return receive(self._channel, time.monotonic() + patience(allowed))
        except TimeoutError:
            how = f"gives no answer in {patience(allowed):.0f} s"
        except (ValueError, RecursionError) as error:
            how = f"gives an answer that cannot be used ({on_one_line(error)})"
        except (EOFError, OSError):
            how = self._ending(allowed)
        raise CheckpointError(f"{request.blame} {how}")

    def _ending(self, allowed: float) -> str:
        """Return how it came to its end by itself."""
        assert self._process.stderr is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.poll()
        self._process.kill()
        said = (self._process.stderr.read(10_000) or b"").decode("utf-8", "replace")
        if code == -signal.SIGPROF:
            return f"takes more than {allowed:.2g} s to compute"
        if any(sign in said for sign in _SIGNS_OF_MEMORY):
            return _TOO_LARGE
        ending = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        last = said.strip().rpartition("\n")[2]
        return f"ends its process ({ending})" + (f": {on_one_line(last)}" if last else "")


# Messages of Rust, C++ and the C library about it before they abort.
_SIGNS_OF_MEMORY = ("memory allocation of", "bad_alloc", "cannot allocate memory")
_TOO_LARGE = f"needs more than {BYTES // 10**9} GB of memory"


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    process.kill()
    channel.close()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def _packed(request: Request) -> bytes:
    try:
        return pack([request.method, *request.arguments], TEXT)
    except ValueError as error:
        raise PromptError(
            f"the text is too long for a tokenizer: {error}",
            hint="No model's context holds that much. Send a part of it.",
        ) from None


def _value(reply: Any, blame: str) -> Any:
    """Return what a reply holds. Raises the error where it is one."""
    if not isinstance(reply, dict):
        raise CheckpointError(f"{blame} gives an answer that cannot be used")
    if "error" not in reply:
        return reply.get("value")
    kind, text = reply["error"], str(reply.get("text"))
    hint = reply.get("hint")
    if kind in ("CheckpointError", "PromptError"):
        error = PromptError if kind == "PromptError" else CheckpointError
        raise error(text, hint=hint if isinstance(hint, str) else None)
    if kind == "MemoryError":
        raise CheckpointError(f"{blame} {_TOO_LARGE}")
    raise CheckpointError(f"{blame} fails: {text or kind}")
