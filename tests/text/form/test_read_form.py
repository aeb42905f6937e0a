"""Forms from the command line: a schema as JSON or in a file, a grammar in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from form_walks import compiled, has_form

from mixchat.base.errors import UsageError
from mixchat.text.form.output_constraint import read_grammar, read_schema

NUMBER = '{"type": "integer", "maximum": 5}'


@pytest.mark.parametrize("text", [NUMBER, f"\n {NUMBER}\n", f"\ufeff{NUMBER}"])
def test_a_schema_is_read_from_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    form = compiled(read_schema(str(tmp_path / "s.json")))
    assert (has_form(form, "5"), has_form(form, "6")) == (True, False)


def test_a_schema_is_taken_from_the_command_line() -> None:
    assert has_form(compiled(read_schema(f"  {NUMBER}")), "5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,\n "b" 2}', "not JSON at line 2, column 6: Expecting ':' delimiter"),
        (b"", "not JSON at line 1, column 1: Expecting value"),
        (b'{"minimum": NaN}', "not JSON: NaN is not a number in JSON"),
        (b'{"minimum": ' + 5000 * b"1" + b"}", "not JSON: Exceeds the limit"),
        (100_000 * b"[", "too deeply nested"),
        (b'{"a": "\xff"}', "not UTF-8 at offset 7"),
        (b"[1]", "a JSON schema has to be an object"),
        (b'{"type": "foo"}', "the schema cannot be used at #: Invalid type: foo"),
        (4_000_001 * b" ", "more than 4 MB"),
    ],
)
def test_a_schema_that_cannot_be_read_is_refused_with_its_file_and_place(
    tmp_path: Path, text: bytes, message: str
) -> None:
    file = tmp_path / "s.json"
    file.write_bytes(text)
    with pytest.raises(UsageError) as error:
        read_schema(str(file))
    assert str(error.value).startswith(f"{file}: {message}")


def test_an_error_of_the_command_line_names_its_flag() -> None:
    with pytest.raises(UsageError, match=r"^--schema: not JSON at line 1, column 9: "):
        read_schema('{"type":')


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/", "\0"])
def test_a_file_that_cannot_be_read_is_refused(path: str) -> None:
    for read in (read_schema, lambda path: read_grammar(Path(path))):
        with pytest.raises(UsageError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("g.lark", 'start: "a"'),
        ("g.LARK", 'start: "a"'),
        ("g.gbnf", 'root ::= "a"'),
        ("g.txt", 'start: "a"'),
        ("g.txt", '# a comment\n  root ::= "a"'),
        ("g", 'other ::= "b"\nroot ::= "a"'),
    ],
)
def test_the_ending_tells_the_kind_of_a_grammar_or_its_text_does(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    form = compiled(read_grammar(tmp_path / name))
    assert (has_form(form, "a"), has_form(form, "b")) == (True, False)


def test_the_ending_counts_more_than_the_text(tmp_path: Path) -> None:
    (tmp_path / "g.lark").write_text('root ::= "a"')
    with pytest.raises(UsageError, match=r"g\.lark: the grammar cannot be used at line 1"):
        read_grammar(tmp_path / "g.lark")
