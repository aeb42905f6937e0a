"""Shows a long paste as `[200 lines pasted]`, and sends all of it.

In the prompt a paste is one character, so that no key can change a part of its label.
"""

from __future__ import annotations

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput

from mixchat.base.quantities import format_count

_MAX_LINES, _MAX_CHARACTERS = 20, 2000  # of a paste that is shown whole
_FIRST = 0x100000  # for private use, and fonts with icons use lower ones


class FoldedPastes(Processor):
    """The long pastes of a chat, which its history needs too, and their labels on the screen."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}  # by the character that stands for each

    def folded(self, paste: str) -> str:
        """Return a paste with plain newlines, or the character that stands for a long one."""
        # Some terminals paste carriage returns. A character of ours would stand for another paste.
        text = self.whole(paste.replace("\r\n", "\n").replace("\r", "\n"), "")
        if text.count("\n") < _MAX_LINES and len(text) <= _MAX_CHARACTERS:
            return text
        character = chr(_FIRST + len(self._texts))
        self._texts[character] = text
        return character

    def whole(self, text: str, replacement: str | None = None) -> str:
        """Return a text with each paste, or with a replacement, in place of its character."""
        # In one pass, because a paste may have the character of another one.
        return text.translate(
            {
                ord(character): paste if replacement is None else replacement
                for character, paste in self._texts.items()
            }
        )

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        shown: StyleAndTextTuples = []
        columns = [0]  # on the screen, of each character of the line
        for style, text, *_ in transformation_input.fragments:
            for character in text:
                label = self._label(character)
                shown.append((style, label))
                columns.append(columns[-1] + len(label))
        if len(columns) == columns[-1] + 1:
            return Transformation(transformation_input.fragments)

        def to_source(column: int) -> int:
            return max(0, sum(start <= column for start in columns) - 1)

        return Transformation(shown, lambda at: columns[min(at, len(columns) - 1)], to_source)

    def _label(self, character: str) -> str:
        text = self._texts.get(character)
        if text is None:
            return character
        lines = text.removesuffix("\n").count("\n") + 1
        size = format_count(lines, "line") if lines > 1 else f"{len(text):,} characters"
        return f"[{size} pasted]"
