"""The sandbox: a child process that runs what strangers wrote.

A checkpoint's tokenizer and template, and the schema or grammar of a request, can loop, grow
without end or abort. No list of forbidden functions prevents that. So the child has limits of
memory, time and output, and everything that goes wrong in it ends as one `CheckpointError`.
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
from typing import Any

from mixchat.base.errors import CheckpointError, PromptError, UsageError, short_message
from mixchat.base.progress import in_background
from mixchat.text.sandbox_protocol import MAX_MEMORY, receive, to_frame

_MAX_CALL = 2_000_000  # bytes of a call, which take up to 800 MB to encode
_CPU_S, _CPU_S_PER_BYTE = 2, 2e-6  # a MB of text takes 1 s
_VOCABULARY_CPU_S = 10  # one of 262,000 tokens with as many merges takes 3 s
_WALL_S_PER_CPU_S = 10  # a busy machine may give a process a tenth of a core

# With -I nothing in the current directory is imported, and no PYTHON* variable has an effect.
_COMMAND = (
    *("-I", "-c"),
    "import importlib, sys; *sys.path[:], program, argument = sys.argv[1:]; "
    "importlib.import_module(program).main(argument)",
)
# The variables that the child gets: the paths of libraries, and the encoding of file names. It does
# not get the keys and tokens of the person who runs mixchat.
_KEPT_VARIABLES = (
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR"),
)
# One thread is enough, and each takes address space.
_SET_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}


def cpu_seconds(method: str, size: int) -> float:
    """Return the computing time that a call of `size` bytes may take."""
    seconds = _VOCABULARY_CPU_S if method == "load_tokenizer" else _CPU_S
    return seconds + size * _CPU_S_PER_BYTE


def reply_seconds(cpu_seconds: float) -> float:
    """Return the seconds until a reply is due, also from a child that does not compute."""
    return _WALL_S_PER_CPU_S * cpu_seconds


@dataclass(frozen=True)
class SandboxCall:
    """A call of a method in the sandbox. An error message about it begins with `subject`.

    `seconds` is the computing time that it may take, by default what its method and its size need.
    `max_bytes` bounds the size of the call.
    """

    subject: str
    method: str
    arguments: tuple[object, ...] = ()
    seconds: float | None = None
    max_bytes: int = _MAX_CALL

    def allowed(self, size: int = 0) -> float:
        """Return how many seconds a call of `size` bytes may compute."""
        return cpu_seconds(self.method, size) if self.seconds is None else self.seconds

    def frame(self) -> bytes:
        """Return the call as it is sent. Raises `PromptError` if it is too long."""
        try:
            return to_frame([self.method, *self.arguments], self.max_bytes)
        except ValueError as error:
            raise PromptError(
                f"the text is too long for a tokenizer: {error}",
                hint="No model's context holds that much. Send a part of it.",
            ) from None


class Sandbox:
    """Sends calls to the child, one at a time, and starts another child if one has ended."""

    def __init__(
        self, program: str, opening: Sequence[SandboxCall] = (), argument: str = ""
    ) -> None:
        """Start a child that runs `main(argument)` of the module `program`. Do not wait for it.

        `opening` are the calls that each child serves before all others.
        """
        self._command = (program, argument)
        self._opening = opening
        self._lock = threading.Lock()
        self._child: _Child | None = _Child(self._command, opening)
        _sandboxes.add(self)

    def opened(self) -> Sequence[Any]:
        """Return the values of the opening calls. Raises `CheckpointError`."""
        with self._lock:
            try:
                return self._opened().values
            except BaseException:
                self.close()
                raise

    def ask(self, call: SandboxCall) -> Any:
        """Return the value of a call. Raises `CheckpointError` or `PromptError`."""
        frame = call.frame()
        with self._lock:
            try:
                reply = self._opened().ask(call, frame)
            except BaseException:
                # Also after Ctrl-C, or the next call would get this reply.
                self.close()
                raise
        return _value(reply, call.subject)

    def interrupt(self) -> None:
        """End the child, so that a call of another thread fails at once."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the child. No other thread may use it."""
        child = self._child
        self._child = None
        if child is not None:
            child.end()

    def forget(self) -> None:
        """After a fork, leave the child to the parent process, and start another child.

        Both would read each other's replies.
        """
        self._lock = threading.Lock()
        child = self._child
        self._child = None
        if child is not None:
            child.leave()

    def _opened(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._command, self._opening)
        child = self._child
        for call in self._opening[len(child.values) :]:
            child.values.append(_value(child.reply(call, call.allowed()), call.subject))
        return child


_sandboxes = weakref.WeakSet[Sandbox]()


def _forget_all() -> None:
    for sandbox in _sandboxes:
        sandbox.forget()


os.register_at_fork(after_in_child=_forget_all)


class _Child:
    def __init__(self, command: tuple[str, str], opening: Sequence[SandboxCall]) -> None:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        channel, child_end = socket.socketpair()
        with child_end:
            process = subprocess.Popen(
                [sys.executable, *_COMMAND, *sys.path, *command],
                stdin=child_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=kept | _SET_VARIABLES,
                start_new_session=True,  # Ctrl-C does not reach it
            )
        assert process.stderr is not None
        # A child that wrote nothing is not waited for.
        os.set_blocking(process.stderr.fileno(), False)
        self.values: list[Any] = []  # of the opening calls
        self._process = process
        self._channel = channel
        self.end = weakref.finalize(self, _end, process, channel)
        frames = [(call.frame(), call.allowed()) for call in opening]

        def send_opening() -> None:  # the child reads nothing before it has imported its libraries
            for frame, allowed in frames:
                self._send(frame, allowed)

        in_background(send_opening)

    def leave(self) -> None:
        """Close this process's end, and do not end the child."""
        self.end.detach()
        self._channel.close()

    def kill(self) -> None:
        """Kill the process. The calls that wait for it fail."""
        self._process.kill()

    def ask(self, call: SandboxCall, frame: bytes) -> Any:
        """Return the reply to a call. Raises `CheckpointError` if none comes."""
        allowed = call.allowed(len(frame))
        self._send(frame, allowed)
        return self.reply(call, allowed)

    def _send(self, frame: bytes, allowed: float) -> None:
        self._channel.settimeout(reply_seconds(allowed))
        with suppress(OSError):  # `reply` reports a child that is gone
            self._channel.sendall(to_frame(allowed) + frame)

    def reply(self, call: SandboxCall, allowed: float) -> Any:
        """Return the next reply, which is for `call`. It may compute for `allowed` seconds.

        Raises `CheckpointError` if none comes.
        """
        try:
            return receive(self._channel, time.monotonic() + reply_seconds(allowed))
        except TimeoutError:
            fault = f"gives no answer in {reply_seconds(allowed):.0f} s"
        except (ValueError, RecursionError) as error:
            raise unusable(call.subject, f" ({short_message(error)})") from None
        except (EOFError, OSError):
            fault = self._ending(allowed)
        raise CheckpointError(f"{call.subject} {fault}")

    def _ending(self, allowed: float) -> str:
        assert self._process.stderr is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.poll()
        self._process.kill()
        output = (self._process.stderr.read(10_000) or b"").decode("utf-8", "replace")
        # The timer of computing time, which the child sets for each call.
        if code == -signal.SIGPROF:
            return f"takes more than {allowed:.2g} s to compute"
        if any(message in output for message in _OUT_OF_MEMORY):
            return _TOO_LARGE
        ending = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        last = output.strip().rpartition("\n")[2]
        return f"ends its process ({ending})" + (f": {short_message(last)}" if last else "")


# Messages of Rust, C++ and the C library before they abort.
_OUT_OF_MEMORY = ("memory allocation of", "bad_alloc", "cannot allocate memory")
_TOO_LARGE = f"needs more than {MAX_MEMORY // 10**9} GB of memory"


_ERRORS = {error.__name__: error for error in (CheckpointError, PromptError, UsageError)}


def unusable(subject: str, reason: str = "") -> CheckpointError:
    """Return the error for a child that sends anything but the value of the call."""
    return CheckpointError(f"{subject} gives an answer that cannot be used{reason}")


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    process.kill()
    channel.close()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def _value(reply: Any, subject: str) -> Any:
    """Return the value in a reply. Raises the error that the reply has instead."""
    if not isinstance(reply, dict):
        raise unusable(subject)
    if "error" not in reply:
        return reply.get("value")
    error = reply["error"]
    text = str(reply.get("text"))
    hint = reply.get("hint")
    if error in _ERRORS:
        raise _ERRORS[error](text, hint=hint if isinstance(hint, str) else None)
    if error == "MemoryError":
        raise CheckpointError(f"{subject} {_TOO_LARGE}")
    raise CheckpointError(f"{subject} fails: {text or error}")
