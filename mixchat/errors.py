"""The tree of errors: each knows its exit code and, where there is one, what to do about it.

Everything a person can cause or cure is a `MixchatError`; the command line catches that class in
one place and prints `error: <message>` and the hint. Anything else that escapes is our bug.

| exit code | meaning                                                          |
| --------- | ---------------------------------------------------------------- |
| 0         | done                                                             |
| 1         | a fault of mixchat's own, or of the system beneath it            |
| 2         | wrong use: an unknown flag, a value that cannot be read          |
| 3         | the prompt cannot be used: empty, not text, longer than context  |
| 4         | there is no such model or chat, or it is not on this machine     |
| 5         | the hub cannot be reached, refuses, or sends something wrong     |
| 6         | a checkpoint, model or saved chat is damaged or unsupported      |
| 7         | not enough disk or memory, or a chat that cannot be saved        |
| 8         | something else has to be installed first                         |
| 9         | the answer has no block of code, which --extract asked for       |
| 130       | interrupted (Ctrl-C)                                             |
| 141       | the reader of the output went away (closed pipe)                 |
"""

_LONGEST = 380  # characters


class MixchatError(Exception):
    """Base of every error with a message for a person. `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # What a file from elsewhere says can be of any length; what is wrong is said at its start.
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")
        self.hint = hint


class UsageError(MixchatError):
    """A value on the command line or in the environment cannot be used."""

    exit_code = 2


class PromptError(MixchatError):
    """The prompt is empty, is not text, or is longer than the context."""

    exit_code = 3


class ModelNotFoundError(MixchatError):
    """No model of that name exists, here or on the hub."""

    exit_code = 4


class ChatNotFoundError(MixchatError):
    """No chat of that ID or name is kept, or several are meant by it."""

    exit_code = 4


class HubError(MixchatError):
    """The hub cannot be reached, refuses, or sends something wrong."""

    exit_code = 5


class CheckpointError(MixchatError):
    """A checkpoint, a kept model or chat is damaged, incomplete, or of an unsupported kind."""

    exit_code = 6


class ResourceError(MixchatError):
    """There is not enough disk or memory; the message gives what is needed and what there is."""

    exit_code = 7


class MissingDependencyError(MixchatError):
    """An optional package, or a tool such as pip, is not installed."""

    exit_code = 8


class NoCodeError(MixchatError):
    """An answer has no block of code, and that alone was asked for."""

    exit_code = 9
