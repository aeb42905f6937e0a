"""README and the pages in .github are right about commands, codes, rooms and links."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from mixchat.base import errors
from mixchat.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / ".github").glob("*.md")}
LINK = re.compile(
    r"https://(?:raw\.githubusercontent|github)\.com/[\w-]+/mixchat/(?:blob/)?main/([^)#]+)"
)
PACKAGE = ROOT / "mixchat"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))


def exit_codes(text: str) -> dict[int, str]:
    rows = re.findall(r"^\| (\d+) +\| (.+?) +\|$", text, flags=re.MULTILINE)
    return {int(code): meaning for code, meaning in rows}


def command_lines() -> list[str]:
    """Each `mixchat ...` of all shell blocks, without redirections, pipes and comments."""
    text = "\n".join([README, *PAGES.values()])
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    blocks = re.sub(r"^docker .*$", "", blocks, flags=re.MULTILINE)  # mixchat is an image there
    found = re.findall(r"\bmixchat [^\n|>#]*|\bmixchat$", blocks, flags=re.MULTILINE)
    return [line.strip() for line in found]


def modules_of(room: Path) -> list[str]:
    files = [path.name for path in room.glob("*.py") if not path.name.endswith("__.py")]
    rooms = [f"{path.parent.name}/" for path in room.glob("*/__init__.py") if room != PACKAGE]
    return sorted(files + rooms)


def test_the_table_of_exit_codes_is_that_of_the_errors():
    classes = [errors.MixchatError, *errors.MixchatError.__subclasses__()]
    assert {error.exit_code for error in classes} == set(range(1, 10))
    assert {*range(10), 130, 141} == set(exit_codes(PAGES["scripts.md"]))


def test_a_command_in_readme_or_a_page_is_valid():
    """Its name, flags and arguments are parsed as on the command line; nothing is run."""
    group: Any = typer.main.get_command(app)
    for line in command_lines():
        name, *arguments = shlex.split(line)[1:]
        assert name in group.commands, line
        group.commands[name].make_context(name, arguments)


def test_readme_is_read_in_some_minutes():
    assert len(README.split()) <= 1700


def test_a_link_of_readme_is_absolute_and_names_a_file_that_is_there():
    """PyPI shows README without the repository, so relative links and images lead nowhere."""
    targets = re.findall(r"\]\((.+?)\)", README)
    assert all(target.startswith("https://") for target in targets)
    files = [match[1] for target in targets if (match := LINK.match(target))]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert files


def test_readme_names_every_page():
    assert [name for name in PAGES if f".github/{name}" not in README] == []


def test_a_page_lists_every_known_model():
    from mixchat.install.known_models import KNOWN

    assert [name for name in KNOWN if f"`{name}`" not in PAGES["models.md"]] == []


def test_contributing_shows_every_room():
    picture = PAGES["CONTRIBUTING.md"].split("## The rooms")[1].split("Some rules")[0]
    shown = re.findall(r"^ +(?:\+--> )?(\w+)  |^`(\w+)/`", picture, flags=re.MULTILINE)
    assert sorted(map("".join, shown)) == [room.name for room in ROOMS if room.parent == PACKAGE]


@pytest.mark.parametrize("room", [PACKAGE, *ROOMS], ids=lambda room: room.stem)
def test_a_room_says_of_every_module_what_it_is_for(room):
    text = (room / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    entries = re.findall(r"^- ([\w./, ]+): \S", text, flags=re.MULTILINE)
    assert sorted(name for entry in entries for name in entry.split(", ")) == modules_of(room)


def test_ci_runs_the_test_command_word_for_word():
    command = re.findall(r"^pip install -e .*$", README, flags=re.MULTILINE)
    assert len(command) == 1
    assert command[0] in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_chat_s_commands_are_those_that_help_shows():
    from mixchat.chat.terminal.commands import help_text

    shown = PAGES["chat.md"].split("```\n>>> /help\n")[1].split("```")[0]
    assert shown == help_text(80) + "\n"
