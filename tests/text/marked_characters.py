"""A tokenizer of characters, and of control tokens without a text."""

from collections.abc import Iterable, Sequence

from mixchat.text.detokenizer import TokenBytes


class MarkedCharacters:
    """A token is a character, or a mark: a control token, whose id is a private character."""

    token_bytes = TokenBytes([chr(i).encode(errors="ignore") for i in range(0xE000)], {})

    def __init__(self, marks: Iterable[str]) -> None:
        self.control_tokens = {name: 0xE000 + number for number, name in enumerate(marks)}

    def decode(self, ids: Sequence[int]) -> str:
        marks = self.control_tokens.values()
        return "".join(chr(token) for token in ids if token not in marks)

    def encode_template(self, text: str) -> list[int]:
        for name, token in self.control_tokens.items():
            text = text.replace(name, chr(token))
        return list(map(ord, text))
