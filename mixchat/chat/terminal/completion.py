"""Completes commands and their arguments while they are typed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from mixchat.base.sanitize import sanitize
from mixchat.chat.printing import one_line

CompleteArgument = Callable[[str], "Iterable[str] | Iterable[tuple[str, str]]"]
"""Returns the arguments that the start of one may mean, with or without texts for the menu. It may
raise `OSError`."""

_QUOTES = ("'", '"')
_MAX_FILES = 1000  # more than anyone reads, few enough to show at every key


@dataclass(frozen=True)
class CommandCompletion:
    """A command's line in the menu, and the completion of its argument, None without one.

    Of the results of `argument`, only those that start with the typed text are offered, unless it
    is `file_names`.
    """

    help: str = ""
    argument: CompleteArgument | None = None


def file_names(text: str) -> Iterator[str]:
    """Yield the files whose names start with `text`. Directories end with `/`.

    Hidden files are included if a dot was typed. The whole argument is one name, so spaces need no
    quotes. A quote that was opened stays, and is closed after a file's name. A directory that
    cannot be read has no names.
    """
    quote = text[:1] if text[:1] in _QUOTES else ""
    typed = text[len(quote) :]
    folder, slash, start = typed.rpartition("/")

    def is_offered(name: str) -> bool:
        hidden = name.startswith(".") and not start.startswith(".")
        # A name with a newline or an escape cannot be typed, or shown as it is.
        plain = sanitize(name) == name and not {"\n", "\t"} & set(name)
        return name.startswith(start) and not hidden and plain

    def is_directory(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link in a circle
            return False

    try:
        with os.scandir(os.path.expanduser(folder + slash) or ".") as entries:
            offered = islice((entry for entry in entries if is_offered(entry.name)), _MAX_FILES)
            files = sorted((entry.name, is_directory(entry)) for entry in offered)
    except (OSError, ValueError):  # the latter for a NUL in the text
        return
    for name, has_files in files:
        has_meaning = name.startswith((*_QUOTES, "~"))
        parent = folder + slash or ("./" if has_meaning else "")
        yield quote + parent + name + ("/" if has_files else quote)


def file_argument(text: str) -> Path:
    """Return the file that an argument names, without quotes, `~` expanded."""
    text = text.strip()
    if text[:1] in _QUOTES:
        text = text[1:].removesuffix(text[0])
    return Path(os.path.expanduser(text))


class CommandCompleter(Completer):
    """Completes `/commands` and their arguments, but no line without a slash."""

    def __init__(self, commands: Mapping[str, CommandCompletion]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in document.text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for known, candidate in self._commands.items():
                if known.startswith(name):
                    yield Completion(
                        known + (" " if candidate.argument else ""),
                        start_position=-len(name),
                        display=f"/{known}",
                        display_meta=candidate.help,
                    )
            return
        command = self._commands.get(name)
        if command is None or command.argument is None:
            return
        typed = argument.lstrip()
        try:
            words = command.argument(typed)
            offered = [(word, "") if isinstance(word, str) else word for word in words]
        except OSError:
            return
        for word, note in offered:
            display = word
            if command.argument is file_names:  # `b/` for `a/b/`, and `b'` for `a/b'`
                display = word[word.rfind("/", 0, -1) + 1 :]
            elif not word.casefold().startswith(typed.casefold()):
                continue
            yield Completion(
                word,
                start_position=-len(typed),
                display=one_line(display),
                display_meta=one_line(note),
            )
