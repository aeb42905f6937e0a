"""README's section "Reference" is what the commands are, and what --help says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import reference
import typer

from mixchat.cli.setting import settings_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = reference.commands()


def help_of(name: str) -> str:
    command: Any = COMMANDS[name]
    return str(command.get_help(command.context_class(command, info_name=name)))


def section_of(name: str) -> str:
    found = re.search(rf"<code>{re.escape(name)} \[OPTIONS\].*?</details>", README, re.DOTALL)
    return found[0] if found else ""


def test_the_reference_is_up_to_date() -> None:
    update = "bring README up to date with: python tests/reference.py README.md"
    assert reference.shown(README) == reference.reference(), update


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_the_flags_that_help_shows(name: str) -> None:
    lines = re.findall(r"^  (-\S.*)$", help_of(name), flags=re.MULTILINE)
    names = [re.split(r" {2,}", line)[0] for line in lines]
    shown = {flag for line in names for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)}
    rows = [row.split(" | ")[0] for row in section_of(name).splitlines() if row.startswith("| `-")]
    assert {flag for row in rows for flag in re.findall(r"`(--?[a-z-]+)`", row)} == shown - {
        "--help"
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_says_of_each_flag_what_help_says(name: str) -> None:
    said = "".join(help_of(name).split())  # without the breaks of lines
    rows = [row.split(" | ") for row in section_of(name).splitlines() if row.startswith("| `-")]
    for row in rows:
        text = re.sub(r"( [0-9]+ (to [0-9]+|or more)\.)?( Default: .*\.)?$", "", row[1].strip(" |"))
        assert "".join(text.split()) in said


def test_readme_names_each_setting_of_run_with_its_variable() -> None:
    rows = section_of("mixchat run").splitlines()
    for key, parameter in settings_of(COMMANDS["mixchat run"]).items():
        assert any(f"`--{key}`" in row and f"`{parameter.envvar}`" in row for row in rows)


def test_what_is_around_the_commands_stays_when_they_are_written_anew() -> None:
    old = f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n"
    new = reference.updated(old)
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert reference.shown(new) == reference.reference()
    with pytest.raises(ValueError, match="README has no"):
        reference.updated("no place for it")


def test_a_new_flag_makes_the_reference_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    @app.callback()
    def group() -> None:
        """Some commands."""

    @app.command()
    def new(flag: bool = typer.Option(False, "--flag", help="A | new one.")) -> None:
        """Do <something>."""

    monkeypatch.setattr(reference, "app", app)
    written = reference.reference()
    assert "<code>mixchat new [OPTIONS]</code><br>Do &lt;something&gt;." in written
    assert "| `--flag` | A \\| new one. |" in written
