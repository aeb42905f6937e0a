"""What a shell completes: commands, flags, the names of models; and how it comes to do that."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from types import MethodType
from typing import Any, cast

import typer

from mixchat.chat.printing import one_line, say, show, show_piece
from mixchat.errors import UsageError
from mixchat.settings import models_dir

VARIABLE = "_MIXCHAT_COMPLETE"  # the scripts of --install-completion set it
_PROGRAM = "mixchat"
# Names with other characters would have a meaning for one shell or another.
_HARMLESS = re.compile(r"[\w.,+@%/-]+( [\w.,+@%/-]+)*")
_SHELLS = ("bash", "zsh", "fish")
# Zsh runs the file at the first Tab: Typer's only defines a function then, and nothing completes.
_ZSH_ENDING = """
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _mixchat_completion "$@"
fi"""


def complete(group: Any, instruction: str) -> int:
    """Print what the words of the command line, which the shell gives, can go on with."""
    completion = _typers()
    completion.completion_init()
    # With Rich the help beside a completion would take longer than all else, for no colour.
    cast("dict[str, Any]", sys.modules).setdefault("rich", None)
    for command in group.commands.values():
        if not hasattr(command, "commands"):
            command.parse_args = MethodType(_parse_lightly, command)
    if instruction == "complete_bash":
        _drop_equals_signs()
    printed = io.StringIO()
    with redirect_stdout(printed):
        code: int = completion.shell_complete(group, {}, _PROGRAM, VARIABLE, instruction)
    text = printed.getvalue()
    show_piece(_with_escaped_spaces(text) if instruction == "complete_bash" else text)
    return code


def install_completion(wanted: bool) -> None:
    """Let the shell that called complete mixchat's command lines. Raises `UsageError`."""
    if wanted:
        shell = _shell()
        _, path = _typers().install(shell=shell, prog_name=_PROGRAM, complete_var=VARIABLE)
        path.write_text(_script(shell) + "\n", encoding="utf-8")
        say(
            f"{path} is written; the next shell that starts completes mixchat's commands",
            stream=sys.stdout,
        )
        raise typer.Exit


def show_completion(wanted: bool) -> None:
    """Print the script with which the shell that called completes. Raises `UsageError`."""
    if wanted:
        show(_script(_shell()))
        raise typer.Exit


def _script(shell: str) -> str:
    names = {"prog_name": _PROGRAM, "complete_var": VARIABLE}
    script = str(_typers().get_completion_script(shell=shell, **names))
    return script + _ZSH_ENDING if shell == "zsh" else script


def _typers() -> Any:
    """Typer's own completion. Its options are not used: they import pydantic at each start."""
    return import_module("typer.completion")


def _shell() -> str:
    shellingham: Any = import_module("shellingham")  # Typer needs it, too
    try:
        name = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        name = ""
    if name not in _SHELLS:
        raise UsageError(
            f"completion is for {', '.join(_SHELLS)}, and this is {name or 'no shell'}",
            hint=f"Type the command in one of these shells: {_PROGRAM} --install-completion",
        )
    return name


def _parse_lightly(command: Any, context: Any, words: list[str]) -> list[str]:
    """Which parameters the words give, without converting them: that would import pydantic."""
    given, rest, _ = command.make_parser(context).parse_args(args=words)
    for parameter in command.params:
        value, source = parameter.consume_value(context, given)
        context.set_parameter_source(parameter.name, source)
        context.params[parameter.name] = value
    context.args = rest
    return context.args  # type: ignore[no-any-return]


def _drop_equals_signs() -> None:
    """Bash makes three words of --model=demo: click expects the first and the last."""
    words, here = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    dropped = [i for i, word in enumerate(words) if word == "=" and i < here]
    os.environ["COMP_WORDS"] = "\n".join(w for i, w in enumerate(words) if i not in dropped)
    os.environ["COMP_CWORD"] = str(here - len(dropped))


def _with_escaped_spaces(lines: str) -> str:
    """Return what bash can put into a command line as it is: it does not quote a word with spaces.

    Where the word was begun with a quote, it stays in quotes, and its spaces are themselves.
    """
    words, here = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    quoted = words[here : here + 1] and words[here].startswith(("'", '"'))
    return lines if quoted else lines.replace(" ", "\\ ")


def among(*words: str) -> Callable[[str], list[str]]:
    """Complete to one of the words."""

    def completions(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completions


def runnable_models(incomplete: str) -> list[str]:
    """Complete to a model: those that always have a name, and those that are kept."""
    from mixchat.weights.models import ALIASES, DEMO

    return among(*dict.fromkeys([*ALIASES, DEMO, *_kept()]))(incomplete)


def saved_chats(incomplete: str) -> list[str]:
    """Complete to a chat's name, if a shell can be given it, or to its ID; the newest first."""
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore()
    try:
        names = [name for name in store.names() if _HARMLESS.fullmatch(name)]
        return among(*names, *reversed(store.ids()))(incomplete)
    except OSError:
        return []


def _kept() -> list[str]:
    """The names of the directories in which models are kept; not what is in them, which takes."""
    try:
        entries = [entry for entry in models_dir().iterdir() if entry.is_dir()]
    except OSError:
        return []
    names = (entry.name for entry in entries if not entry.name.startswith("."))
    return sorted(name for name in names if one_line(name) == name)
