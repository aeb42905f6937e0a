"""Reads and checks texts from arguments, files and standard input."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mixchat.base.context import Context
from mixchat.base.errors import PromptError, UsageError
from mixchat.base.option import is_unicode
from mixchat.base.progress import Note, noted_if_slow, waiting_for
from mixchat.chat.named_prompts import NamedPrompt
from mixchat.chat.plain_text import decode, read_source, read_stream, read_text_file

STDIN = "-"
_LONGEST_CALIBRATION = 2**21  # bytes, more than a calibration takes


def read_files(sources: Iterable[str], context: Context, note: Note) -> dict[str, str]:
    """Return the texts of files and web pages by name. `-` is standard input.

    Raises `PromptError` if one is empty, not text, or too long for the context.
    """
    texts = {}
    for source in sources:
        if source != STDIN:
            with waiting_for(source, note):
                texts[source] = read_source(source, context, note)
            continue
        texts[source] = _read_stdin(context, note)
        if not texts[source].strip():
            raise _empty_stdin()
    return texts


def read_file(path: Path, context: Context, note: Note) -> str:
    """Return the text of a file or pipe. Raises `PromptError` as `read_files` does."""
    with waiting_for(path, note):
        return read_text_file(path, context, note)


def read_prompt(
    argument: str | None,
    files: Mapping[str, str],
    context: Context,
    note: Note,
    kept: NamedPrompt | None = None,
) -> str | None:
    """Return the prompt, or None for a chat if there is neither input nor argument.

    It joins piped standard input, the texts of files and `argument` with blank lines. An argument
    `-` asks for standard input, which is read only once. A prompt that is kept by name gets them
    as its input. Raises `PromptError` if the prompt is
    empty, not text, or too long for the context.
    """
    # Read up to what the context can hold: `yes | mixchat run` took 16 GB until it was killed.
    named = STDIN in files
    piped = None
    if not named and (argument == STDIN or not stdin_is_terminal()):
        piped = _read_stdin(context, note)
    argument = None if argument == STDIN else argument
    if argument is not None and not is_unicode(argument):
        decode(argument.encode("utf-8", "surrogateescape"), "the prompt")
    if piped is None and argument is None and not named and kept is None:
        return None
    texts = [text for text in (piped, *files.values(), argument) if text and text.strip()]
    if kept is None and not texts:
        if argument is None:
            raise _empty_stdin()
        raise PromptError("the prompt is empty", hint="Write a question, or leave it out to chat.")
    prompt = "\n\n".join([*(text.rstrip("\n") for text in texts[:-1]), *texts[-1:]])
    if kept is not None:
        return kept.filled(prompt, context)
    context.check_text(prompt, "the prompt")
    return prompt


def read_beginning(path: Path, note: Note) -> str:
    """Return the beginning of a text to calibrate with. Raises `UsageError`."""
    try:
        with waiting_for(path, note), open(path, "rb") as file:
            data = file.read(_LONGEST_CALIBRATION)
        decoder = codecs.getincrementaldecoder("utf-8")()
        return decoder.decode(data, len(data) < _LONGEST_CALIBRATION)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text (UTF-8)") from None


def stdin_is_terminal() -> bool:
    """Return whether standard input is an open terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def checked(argument: str, name: str) -> str:
    """Return `argument`. Raises `UsageError` if it is empty or not UTF-8."""
    if not argument:
        raise UsageError(f"{name} is empty")
    if not is_unicode(argument):
        raise UsageError(f"{name} is not UTF-8: {argument!r}")
    return argument


def _empty_stdin() -> PromptError:
    hint = "Pipe text into mixchat, or give a PROMPT. In a terminal, 'mixchat run' alone is a chat."
    return PromptError("standard input is empty", hint=hint)


def _read_stdin(context: Context, note: Note) -> str:
    if sys.stdin is None:  # closed
        return ""
    hint = "Ctrl-D ends it" if stdin_is_terminal() else "</dev/null leaves it out"
    with noted_if_slow(note, f"reading standard input; {hint}"):
        # Python would decode it by the locale, which may accept any bytes.
        return read_stream(sys.stdin.buffer, "standard input", context, note)
