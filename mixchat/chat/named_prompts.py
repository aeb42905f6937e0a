"""Prompts that a person keeps by name, as `prompts/NAME.md` next to config.toml."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mixchat.base.context import Context
from mixchat.base.errors import PromptError, UsageError
from mixchat.base.files import open_regular
from mixchat.base.settings import config_file
from mixchat.chat.plain_text import decode

_SUFFIX = ".md"
_NAME = re.compile(r"\w[\w.-]{0,79}")  # names no file outside the directory, and fits in a command
_INPUT = re.compile(r"\{\{ *input *\}\}")
_MAX_BYTES = 1_000_000
_MAX_NAMES = 1000


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt with places for `{{input}}`. Without one, the input follows the text."""

    name: str
    text: str

    def filled(self, words: str, context: Context) -> str:
        """Return the prompt for an input, which may be empty if the text has no place for one.

        Raises `PromptError` if it needs an input, or cannot fit the context.
        """
        count = len(_INPUT.findall(self.text))
        if count and not words.strip():
            raise PromptError(
                f"the prompt {self.name} needs an input",
                hint="Give it words, a file, or on the command line a pipe.",
            )
        # Many places for a long input could fill the memory.
        if len(self.text) + max(count, 1) * len(words) > context.longest_text:
            raise context.text_too_long(f"the prompt {self.name} with its input")
        if not count:
            return "\n\n".join(filter(None, (self.text, words)))
        return _INPUT.sub(lambda match: words, self.text)


def prompts_dir() -> Path:
    """Return the directory of the prompts."""
    return config_file().parent / "prompts"


def prompt_names() -> list[str]:
    """Return the names of the prompts, sorted, or nothing without a directory that can be read."""
    try:
        names = os.listdir(prompts_dir())
    except OSError:
        return []
    stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return sorted(stem for stem in stems if _NAME.fullmatch(stem))[:_MAX_NAMES]


def read_named_prompt(name: str) -> NamedPrompt:
    """Return the prompt of this name.

    Raises `UsageError` if there is none, and `PromptError` for a bad file.
    """
    path = prompts_dir() / f"{name}{_SUFFIX}"
    if not _NAME.fullmatch(name):
        raise _no_prompt(name)
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise _no_prompt(name) from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_BYTES:
        raise PromptError(f"{path}: larger than 1 MB, the most that a prompt may have")
    text = decode(data, str(path)).strip()
    if not text:
        raise PromptError(f"{path} is empty", hint="Write the prompt into it.")
    return NamedPrompt(name, text)


def _no_prompt(name: str) -> UsageError:
    names = prompt_names()
    near = difflib.get_close_matches(name, names, 1)
    hint = f"Did you mean {near[0]}?" if near else f"The prompts: {', '.join(names[:10])}."
    if not names:
        hint = f"Write one: {prompts_dir() / 'NAME'}{_SUFFIX}, with {{{{input}}}} for what it gets."
    return UsageError(f"there is no prompt {name!r:.100}", hint=hint)
