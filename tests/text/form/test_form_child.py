"""Forms that take too much: they end alone, whatever they try."""

import threading
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from form_bombs import bomb, grammar_bomb, late_bomb
from form_walks import compiled, has_form
from patience import PATIENCE_S, wait_until

from mixchat.base.errors import UsageError
from mixchat.text.form.output_constraint import HASTY_S, checked_schema, read_grammar

TOO_MUCH = r"(takes more than [\d.]+ s to compute|needs more than 1 GB of memory)$"


def test_a_schema_that_takes_gigabytes_to_compile_is_refused():
    """It took 12 GB and more in the server's process, which the system ended then."""
    with pytest.raises(UsageError, match=rf"^the schema {TOO_MUCH}"):
        checked_schema(bomb(), HASTY_S)


def test_a_grammar_that_takes_gigabytes_to_compile_is_refused(tmp_path):
    (tmp_path / "g.lark").write_text(grammar_bomb())
    with pytest.raises(UsageError, match=rf"g.lark: the grammar {TOO_MUCH}"):
        read_grammar(tmp_path / "g.lark")


def test_a_form_that_takes_gigabytes_at_a_token_ends_its_own_answer_alone():
    """It compiled in 0.1 s, and took all memory when the answer's second token was chosen."""
    bad = compiled(checked_schema(late_bomb(), HASTY_S))
    good = compiled(checked_schema({"type": "string"}, HASTY_S))
    other, constraint = good(), bad()
    assert constraint.allowed()[ord('"')]
    constraint.accept(ord('"'))
    with pytest.raises(UsageError, match=rf"^the form of the answer {TOO_MUCH}"):
        constraint.accept(ord("x"))
    assert other.accepts(ord('"')) == "taken"
    assert has_form(good, '"x"')


def test_a_check_that_nobody_waits_for_ends_at_once():
    """It went on after the client of the server had left."""
    before, faults = children(), list[Exception]()

    def check() -> None:
        try:
            checked_schema(bomb(), 30.0, at_end)
        except UsageError as error:
            faults.append(error)

    at_end, thread = ExitStack(), threading.Thread(target=check)
    thread.start()
    wait_until(lambda: any(child.cpu_times().user > 0.5 for child in children() - before))
    at_end.close()
    thread.join(PATIENCE_S)
    assert faults
    assert children() <= before


def test_the_sandbox_of_an_answer_that_nobody_wants_ends():
    before = children()
    constraint: Any = compiled(checked_schema({"type": "string"}, HASTY_S))()
    assert constraint.allowed().any()
    one = compiled(checked_schema(late_bomb(), HASTY_S))()
    two = compiled(checked_schema(late_bomb(), HASTY_S))()
    del constraint, one, two
    wait_until(lambda: len(children() - before) <= 1)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())
