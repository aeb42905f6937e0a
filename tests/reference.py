"""The commands in README's section "Reference", out of the live ones.

`python tests/reference.py README.md` brings README up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mixchat.cli.app import app
from mixchat.cli.setting import settings_of

BEGIN = "<!-- begin of what `python tests/reference.py README.md` writes -->"
END = "<!-- end of what it writes -->"


def commands() -> dict[str, Any]:
    """Every click command by its name on the command line; `mixchat` is the first."""
    group: Any = typer.main.get_command(app)
    return {"mixchat": group} | {f"mixchat {name}": each for name, each in group.commands.items()}


def reference() -> str:
    """The commands as Markdown: for each a line to be seen and a table to be opened.

    --help, which every command has, is left out.
    """
    return "\n\n".join(_section(name, command) for name, command in commands().items())


def shown(readme: str) -> str:
    """The commands as README has them. Raises `ValueError` where it has no place for them."""
    _, begun, rest = readme.partition(BEGIN)
    inside, ended, _ = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"README has no {BEGIN} with an {END} behind it")
    return inside.strip()


def updated(readme: str) -> str:
    """README with the commands as they are now."""
    shown(readme)
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{rest.partition(END)[2]}"


def _section(name: str, command: Any) -> str:
    about, *more = (" ".join(text.split()) for text in command.help.split("\n\n"))
    usage = " ".join([name, *_usage(command)])
    head = f"<details><summary><code>{_escaped(usage)}</code><br>{_escaped(about)}</summary>"
    paragraphs = [line for text in more for line in (_escaped(text), "")]
    return "\n".join([head, "", *paragraphs, *_table(command), "", "</details>"])


def _usage(command: Any) -> Iterator[str]:
    yield "[OPTIONS]"
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield parameter.metavar if parameter.required else f"[{parameter.metavar}]"
    if hasattr(command, "commands"):
        yield "COMMAND"


def _table(command: Any) -> Iterator[str]:
    variables = [parameter.envvar for parameter in settings_of(command).values()]
    heads = ["flag", "meaning", *(["variable"] if variables else [])]
    yield _row(heads)
    yield _row(["---"] * len(heads))
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            variable = f"`{parameter.envvar}`" if parameter.envvar in variables else ""
            yield _row([_names(command, parameter), _meaning(parameter), variable][: len(heads)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _names(command: Any, parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    names = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} `{_metavar(command, parameter)}`"


def _metavar(command: Any, parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    context = command.context_class(command)
    # Typer's releases with a click of their own, and those before.
    show = getattr(parameter, "display_type", None) or parameter.make_metavar
    return str(show(context)).strip("<>[]")


def _meaning(parameter: Any) -> str:
    default = parameter.show_default if isinstance(parameter.show_default, str) else None
    if default is None and parameter.show_default and parameter.default not in (None, False):
        default = str(parameter.default)
    limits = _limits(parameter)
    text = _escaped(parameter.help or "")
    return text + (f" {limits}." if limits else "") + (f" Default: {default}." if default else "")


def _limits(parameter: Any) -> str:
    bounds = parameter if hasattr(parameter, "min") else parameter.type
    least, most = getattr(bounds, "min", None), getattr(bounds, "max", None)
    if most is not None:
        return f"{least} to {most}"
    return "" if least is None else f"{least} or more"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(updated(place.read_text(encoding="utf-8")), encoding="utf-8")
