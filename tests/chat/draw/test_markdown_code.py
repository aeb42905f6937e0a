"""Code that is not quite Markdown: without a fence, or broken off within one and resumed."""

import random
from contextlib import closing

import pytest
from markdown_texts import fence
from markdown_tools import Eager, pieces, printed, rows_of
from screens import Terminal

from mixchat.chat.draw.markdown import blocks

CLASS = '''\
class Pair(Base):
    """Two values."""

    def __init__(self, *args, **kwargs):
        self.norm = x**2 + y**2

    def __eq__(self, other):
        if __name__ == "__main__":
            return __file__

print(Pair.__doc__, __FILE__)'''


@pytest.mark.parametrize(
    "text",
    [
        CLASS,
        "function f() {\n  return 1;\n\n  // 2\n}",
        "A poem:\n\n   roses\n      are red",
        "the __init__ method, self.__class__.__name__ and a(__x__)",
        "10**6 + (a)**2",
        "#include <stdio.h>\nint main() {\n    return 0;\n}",
    ],
)
def test_code_without_a_fence_keeps_its_underscores_and_its_spaces(text):
    """`def __init__(self):` was shown as `def init(self):`, in bold, and nothing was indented."""
    assert rows_of(text) == text.split("\n")


def test_emphasis_is_still_drawn():
    assert rows_of("__two words__ **one** _em_ __Note__: **x**, *y*") == [
        "two words one em Note: x, y"
    ]


def resumed(before, after, width=60, height=20, size=7):
    """The terminal with the rest of a text, if the beginning was drawn before it broke off."""
    terminal = Terminal(width, height, "truecolor")
    with closing(Eager(terminal.console, earlier=before)) as stream:
        for piece in pieces(after, size):
            stream.feed(piece)
    return terminal


def test_a_code_block_that_broke_off_is_shown_again_and_resumed_as_code():
    """`# Example` became a heading, and the code's end began a block of its own."""
    before = "See:\n\n```python\ndef f(x):\n    return"
    after = " x\n# Example\nprint(f(1))\n```\n\n# Done\n"
    assert resumed(before, after).rows == [
        "── python ──────────",
        "def f(x):",
        "    return x",
        "# Example",
        "print(f(1))",
        "────────────────────",
        "",
        "Done",
    ]


@pytest.mark.parametrize("mark", ["", "> ", "1. "])
@pytest.mark.parametrize("seed", range(2))
def test_a_resumed_block_looks_as_in_the_whole_text(seed, mark):
    """In lists and quotes, too."""
    made = random.Random(seed)
    indent = "> " if ">" in mark else " " * len(mark)
    code = fence(made, lines=24).lstrip(" ").rstrip("`~").rstrip("\n") + "\n"
    text = mark + code.replace("\n", f"\n{indent}") + "# b\n"
    whole = printed(text, 60, 20, "truecolor")
    cuts = [cut for cut in range(len(mark) + 5, len(text)) if blocks(text[:cut])[-1].is_open]
    assert len(cuts) > 20
    for cut in made.sample(cuts, 3):
        rest = resumed(text[:cut], text[cut:], size=10**6)
        assert rest.is_sane
        assert rest.cells == whole.cells


@pytest.mark.parametrize("before", ["", "Hello", "```\na\n```\n", "```\na\n```", "- a\n  b", "`a"])
def test_what_broke_off_in_no_code_block_is_resumed_as_it_comes(before):
    assert resumed(before, "# x\n").rows == ["x"]
