"""Completes commands, flags, and the names of models and chats in a shell."""

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

from mixchat.base.errors import UsageError
from mixchat.base.settings import models_dir
from mixchat.chat.printing import one_line, say, show, show_piece

COMPLETE_VARIABLE = "_MIXCHAT_COMPLETE"  # set by the scripts of --install-completion
_PROGRAM = "mixchat"
# Other characters have a meaning in some shell.
_HARMLESS = re.compile(r"[\w.,+@%/-]+( [\w.,+@%/-]+)*")
_SHELLS = ("bash", "zsh", "fish")
# Zsh runs the file at the first Tab. Typer's only defines a function then.
_ZSH_ENDING = """
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _mixchat_completion "$@"
fi"""


def complete(group: Any, instruction: str) -> int:
    """Print the completions of the command line that the shell gives."""
    completion = _typer_completion()
    completion.completion_init()
    # Importing Rich would take longer than all the rest.
    cast("dict[str, Any]", sys.modules).setdefault("rich", None)
    for command in group.commands.values():
        command.hidden = False  # a name in no list is completed all the same
        if not hasattr(command, "commands"):
            command.parse_args = MethodType(_parse_lightly, command)
    if instruction == "complete_bash":
        _drop_equals_signs()
    printed = io.StringIO()
    with redirect_stdout(printed):
        code: int = completion.shell_complete(group, {}, _PROGRAM, COMPLETE_VARIABLE, instruction)
    text = printed.getvalue()
    show_piece(_with_escaped_spaces(text) if instruction == "complete_bash" else text)
    return code


def install_completion(wanted: bool) -> None:
    """Install completion for the running shell. Raises `UsageError`."""
    if wanted:
        shell = _shell()
        _, path = _typer_completion().install(
            shell=shell, prog_name=_PROGRAM, complete_var=COMPLETE_VARIABLE
        )
        path.write_text(_script(shell) + "\n", encoding="utf-8")
        say(
            f"wrote {path}; shells that start from now on complete mixchat's commands",
            stream=sys.stdout,
        )
        raise typer.Exit


def show_completion(wanted: bool) -> None:
    """Print the running shell's completion script. Raises `UsageError`."""
    if wanted:
        show(_script(_shell()))
        raise typer.Exit


def _script(shell: str) -> str:
    names = {"prog_name": _PROGRAM, "complete_var": COMPLETE_VARIABLE}
    script = str(_typer_completion().get_completion_script(shell=shell, **names))
    return script + _ZSH_ENDING if shell == "zsh" else script


def _typer_completion() -> Any:
    """Import Typer's completion here, for its options would import pydantic at each start."""
    return import_module("typer.completion")


def _shell() -> str:
    shellingham: Any = import_module("shellingham")  # Typer needs it, too
    try:
        name = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        name = ""
    if name not in _SHELLS:
        raise UsageError(
            f"cannot complete in {name or 'this shell'}: only in {', '.join(_SHELLS)}",
            hint=f"Type the command in one of these shells: {_PROGRAM} --install-completion",
        )
    return name


def _parse_lightly(command: Any, context: Any, words: list[str]) -> list[str]:
    """Set the given parameters without conversion, which imports pydantic."""
    given, rest, _ = command.make_parser(context).parse_args(args=words)
    for parameter in command.params:
        value, source = parameter.consume_value(context, given)
        context.set_parameter_source(parameter.name, source)
        context.params[parameter.name] = value
    context.args = rest
    return context.args  # type: ignore[no-any-return]


def _drop_equals_signs() -> None:
    """Drop the `=` words. Bash makes three words of --model=demo, and click expects two."""
    words, here = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    dropped = [i for i, word in enumerate(words) if word == "=" and i < here]
    os.environ["COMP_WORDS"] = "\n".join(w for i, w in enumerate(words) if i not in dropped)
    os.environ["COMP_CWORD"] = str(here - len(dropped))


def _with_escaped_spaces(lines: str) -> str:
    """Escape spaces, which bash does not do, unless the word starts with a quote."""
    words, here = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    quoted = words[here : here + 1] and words[here].startswith(("'", '"'))
    return lines if quoted else lines.replace(" ", "\\ ")


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Return a completion to one of these words."""

    def completions(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completions


def runnable_models(incomplete: str) -> list[str]:
    """Complete to a fixed name or an installed model."""
    from mixchat.weights.known_models import ALIASES
    from mixchat.weights.models import DEMO

    return one_of(*dict.fromkeys([*ALIASES, DEMO, *_installed()]))(incomplete)


def known_shapes(incomplete: str) -> list[str]:
    """Complete to a known model, for its shapes."""
    from mixchat.weights.known_models import KNOWN

    return one_of(*KNOWN)(incomplete)


def saved_chats(incomplete: str) -> list[str]:
    """Complete to a chat's name or ID, the newest first."""
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore()
    try:
        names = [name for name in store.names() if _HARMLESS.fullmatch(name)]
        return one_of(*names, *reversed(store.ids()))(incomplete)
    except OSError:
        return []


def _installed() -> list[str]:
    try:
        entries = [entry for entry in models_dir().iterdir() if entry.is_dir()]
    except OSError:
        return []
    names = (entry.name for entry in entries if not entry.name.startswith("."))
    return sorted(name for name in names if one_line(name) == name)
