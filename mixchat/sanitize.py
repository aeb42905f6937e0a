"""Keeps what a model writes from acting on the terminal: no cursor moves, titles, turned text."""

from __future__ import annotations

_C0 = set(range(0x20)) - {ord("\n"), ord("\t")}
_DEL_AND_C1 = range(0x7F, 0xA0)
# Marks, embeddings, overrides and isolates: they can show text in another order than it has.
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# A lone surrogate cannot be written in UTF-8 at all.
_SURROGATES = range(0xD800, 0xE000)

VISIBLE = dict.fromkeys(_BIDI, "\ufffd")
"""For `str.translate`: shows what turns text around where it must not be dropped."""

_DROPPED = dict.fromkeys([*_C0, *_DEL_AND_C1, *_BIDI, *_SURROGATES])


def sanitize(text: str) -> str:
    """`text` without control characters (newline and tab stay) and without bidi controls.

    It looks at one character at a time, so text may be cut into pieces anywhere.
    """
    return text.translate(_DROPPED)
