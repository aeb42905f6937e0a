"""Recognizes control markup in tokens, in texts and in the sources of chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterable

# <...>, <|...|>, [...]: one word with a letter or digit in it, so that prose and code are not.
# Only one part of a pattern can take the first letter, or a text without an end would take hours.
_TOKEN = re.compile(r"<[^\s<>\w]*\w[^\s<>]*>|\[[^\s\[\]\w]*\w[^\s\[\]]*\]")
# The same in a template, where square brackets are usually Jinja's own: capitals only.
_TEMPLATE = re.compile(r"<<\w+>>|<[^\s<>{}\w]*\w[^\s<>{}]*>|\[/?[A-Z][A-Z_]+\]|###")
_MISTRAL_V1 = frozenset({"<s>", "</s>", "<unk>", "[INST]", "[/INST]"})


def looks_like_markup(token: str) -> bool:
    """Return whether a token looks like control markup: `<tool>`, `<|im_end|>`, `[INST]`."""
    return _TOKEN.fullmatch(token.strip().strip("\u2581")) is not None


def is_mistral_v1(source: str) -> bool:
    """Return whether a chat template is Mistral's own, of the first generation.

    There `[INST]` and `[/INST]` are ordinary text and nothing else is marked up.
    """
    found = set(_TEMPLATE.findall(source))
    return "[INST]" in found and found <= _MISTRAL_V1


def token_pattern(tokens: Iterable[str], *, whole_words: Iterable[str] = ()) -> re.Pattern[str]:
    """Return a pattern for any of `tokens`, the longest first; without tokens it matches nothing.

    Those in `whole_words` count only where no word character touches them.
    """
    bounded = frozenset(whole_words)
    choices = [
        rf"(?<!\w){re.escape(token)}(?!\w)" if token in bounded else re.escape(token)
        for token in sorted(tokens, key=len, reverse=True)
    ]
    return re.compile("|".join(choices) or r"(?!)")
