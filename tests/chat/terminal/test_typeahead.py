"""Lines typed while nobody reads them, when a prompt takes the terminal over."""

import os
import pty
import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import clear_typeahead, get_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.keys import Keys

from mixchat.chat.terminal import typeahead


@contextmanager
def terminal() -> Iterator[tuple[int, Input]]:
    """The end at which a person types, and the input of a prompt at the other."""
    ours, theirs = pty.openpty()
    try:
        with open(theirs, encoding="utf-8", closefd=False) as file:
            source = Vt100Input(file)
            clear_typeahead(source)
            yield ours, source
    finally:
        os.close(ours)
        os.close(theirs)


def type_keys(keys: bytes, person: int, source: Input) -> None:
    """Type at the one end, and wait until it has come to the other."""
    os.write(person, keys)
    select.select([source.fileno()], [], [], 10)


def test_what_is_typed_at_the_prompt_stays_what_it_is():
    with terminal() as (person, source), typeahead.reading_keys(source):
        assert get_typeahead(source) == []
        os.write(person, b"a\nb\r")
        assert os.read(source.fileno(), 100) == b"a\nb\r"


def test_ctrl_c_after_the_enter_of_a_prompt_is_raised_once_and_keys_are_kept():
    """It was read as a key in raw mode, and the answer that it should stop was given."""
    with terminal() as (person, source):
        with pytest.raises(KeyboardInterrupt), typeahead.reading_keys(source):
            type_keys(b"a\x03b\x03", person, source)
        assert [press.key for press in get_typeahead(source)] == ["a", "b", Keys.ControlC]


def test_ctrl_c_after_the_enter_of_another_line_is_left_to_that_line():
    with terminal() as (person, source):
        with typeahead.reading_keys(source):
            type_keys(b"a\r\x03", person, source)
        keys = [press.key for press in get_typeahead(source)]
        assert keys == ["a", Keys.ControlM, Keys.ControlC]
