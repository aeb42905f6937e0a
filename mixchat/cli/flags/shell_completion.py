"""Completes commands, flags, and the names of models and chats in a shell."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import typer

from mixchat.base.errors import MixchatError, UsageError
from mixchat.chat.printing import say, show_piece

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
    printed = io.StringIO()
    with redirect_stdout(printed):
        code: int = completion.shell_complete(group, {}, _PROGRAM, COMPLETE_VARIABLE, instruction)
    text = printed.getvalue()
    if instruction == "complete_bash":
        # Bash does not escape spaces. It must not in a word that starts with a quote.
        words, position = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
        if not "".join(words[position : position + 1]).startswith(("'", '"')):
            text = text.replace(" ", "\\ ")
    show_piece(text)
    return code


def install_completion(wanted: bool) -> None:
    """Install completion for the running shell. Raises `UsageError`."""
    if not wanted:
        return
    completion = _typer_completion()
    shellingham: Any = import_module("shellingham")  # Typer needs it, too
    try:
        shell = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        shell = ""
    if shell not in _SHELLS:
        raise UsageError(
            f"cannot complete in {shell or 'this shell'}: only in {', '.join(_SHELLS)}",
            hint=f"Type the command in one of these shells: {_PROGRAM} --install-completion",
        )
    names = {"prog_name": _PROGRAM, "complete_var": COMPLETE_VARIABLE}
    _, path = completion.install(shell=shell, **names)
    script = str(completion.get_completion_script(shell=shell, **names))
    script += _ZSH_ENDING if shell == "zsh" else ""
    path.write_text(script + "\n", encoding="utf-8")
    done = f"wrote {path}; shells that start from now on complete mixchat's commands"
    say(done, stream=sys.stdout)
    raise typer.Exit


def _typer_completion() -> Any:
    """Import Typer's completion here, for its options would import pydantic at each start."""
    return import_module("typer.completion")


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Return a completion to one of these words."""

    def completions(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completions


def runnable_models(incomplete: str) -> list[str]:
    """Complete to a fixed name or a model on this machine."""
    from mixchat.weights.known_models import ALIASES
    from mixchat.weights.models import DEMO, names_here

    return one_of(*dict.fromkeys([*ALIASES, DEMO, *names_here()]))(incomplete)


def models_here(incomplete: str) -> list[str]:
    """Complete to a model on this machine."""
    from mixchat.weights.models import names_here

    # The known ones are left out: `rm` offered models that nobody had installed.
    return one_of(*names_here())(incomplete)


def known_shapes(incomplete: str) -> list[str]:
    """Complete to a known model, for its shapes."""
    from mixchat.weights.known_models import KNOWN

    return one_of(*KNOWN)(incomplete)


def saved_chats(incomplete: str) -> list[str]:
    """Complete to a chat's name or ID, the newest first."""
    from mixchat.chat.saved.chat_store import ChatStore

    try:
        chats = ChatStore().all()
        names = [chat.name for chat in chats if chat.name and _HARMLESS.fullmatch(chat.name)]
        return one_of(*names, *(chat.id for chat in chats))(incomplete)
    except MixchatError:
        return []
