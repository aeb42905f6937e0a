"""Removes what acts on a terminal (cursor moves, titles, bidi controls) from untrusted text."""

from __future__ import annotations

_C0 = set(range(0x20)) - {ord("\n"), ord("\t")}
_DEL_AND_C1 = range(0x7F, 0xA0)
# They can change the order in which text is shown.
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# A lone surrogate cannot be written in UTF-8.
_SURROGATES = range(0xD800, 0xE000)

VISIBLE = dict.fromkeys(_BIDI, "\ufffd")
"""For `str.translate`, which replaces bidi controls that must not be dropped."""

_DROPPED = dict.fromkeys([*_C0, *_DEL_AND_C1, *_BIDI, *_SURROGATES])


def sanitize(text: str) -> str:
    """Return `text` without bidi controls, and control characters but newline and tab.

    Text may be cut into pieces anywhere.
    """
    return text.translate(_DROPPED)
