"""README keeps its word: its exit codes, tree of modules and test command are the real ones."""

import re
from pathlib import Path

from mixchat import errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def exit_codes(text: str) -> dict[int, str]:
    rows = re.findall(r"^\| (\d+) +\| (.+?) +\|$", text, flags=re.MULTILINE)
    return {int(code): meaning for code, meaning in rows}


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    assert exit_codes(README) == exit_codes(errors.__doc__ or "")
    classes = [errors.MixchatError, *errors.MixchatError.__subclasses__()]
    assert {error.exit_code for error in classes} == set(range(1, 10))
    assert {*range(10), 130, 141} == set(exit_codes(README))


def test_the_tree_shows_every_module_once() -> None:
    tree = README.split("```\nmixchat/\n")[1].split("```")[0]
    shown: list[str] = []
    room = ""
    for line in tree.splitlines():
        if found := re.match(r"  (\w+)/ ", line):
            room = f"{found[1]}/"
        elif line.startswith("    "):
            shown += [room + name for name in re.findall(r"\w+\.py", line)]
        else:
            shown += re.findall(r"\w+\.py", line)
    package = ROOT / "mixchat"
    modules = [str(path.relative_to(package)) for path in package.rglob("*.py")]
    assert sorted(shown) == sorted(m for m in modules if not m.endswith("__.py"))


def test_ci_runs_the_test_command_word_for_word() -> None:
    command = re.findall(r"^pip install -e .*$", README, flags=re.MULTILINE)
    assert len(command) == 1
    assert command[0] in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_chat_s_commands_are_those_that_help_shows() -> None:
    from mixchat.chat.command_help import help_text
    from mixchat.chat.commands import usages

    shown = README.split("```\n>>> /help\n")[1].split("```")[0]
    assert shown == help_text(usages(), 80) + "\n"
