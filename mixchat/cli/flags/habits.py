"""Names our flag or command for another program's, or for a misspelled one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mixchat.base.errors import UsageError

_NEAR_RATIO = 0.65  # of difflib, by which `temprature` is near, unlike `threads` and `stream`
# By our flag, those of ollama, llama.cpp and llm.
_FOREIGN_FLAGS = {
    "--device-memory": (
        "-ngl --ngl --gpu-layers --n-gpu-layers --num-gpu -ncmoe --n-cpu-moe -cmoe --cpu-moe -ot "
        "-ts --tensor-split"
    ),
    "--device": "-mg --main-gpu",
    "--host-memory": "--mlock --no-mmap",
    "--ctx-size": "-c --ctx --num-ctx --n-ctx --context",
    "--kv-bits": "-ctk -ctv --cache-type-k --cache-type-v",
    "--model": "-hf -hfr --hf-repo",
    "PROMPT": "-p --prompt",
    "--system": "-sys --system-prompt",
    "--max-tokens": "--predict --n-predict --num-predict",
    "--parallel": "-np --num-parallel",
    "--schema": "-j --json-schema --format",
    "--grammar": "--grammar-file",
    "--worker": "--rpc",
}
_FLAGS = {flag: ours for ours, flags in _FOREIGN_FLAGS.items() for flag in flags.split()}
# Click would read -ngl as -n with a value, and -hf as -h.
_MISREAD = {flag for flag in _FLAGS if re.fullmatch(r"-\w{2,}", flag)}
_FOREIGN_COMMANDS = {
    "--help": "help",
    "--version": "version",
    "run": "chat prompt ask cli",
    "chats": "logs",
    "list": "models ls",
    "serve": "server",
    "download": "pull install get import create",
    "rm": "remove delete uninstall",
}
_COMMANDS = {name: ours for ours, names in _FOREIGN_COMMANDS.items() for name in names.split()}


def refuse_foreign_flags(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for another program's flag that click would misread."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in own:
        if flag in _MISREAD:
            raise UsageError(f"there is no flag {flag}: use {_FLAGS[flag]}")


def unknown_flag(flag: str, context: Any) -> UsageError:
    """Return the error for a flag that a command lacks, with the flag or argument to use."""
    parameters = context.command.params
    known = [opt for each in parameters for opt in (*each.opts, *each.secondary_opts)]
    ours = _FLAGS.get(flag)
    if ours and ours in (*known, *(each.metavar for each in parameters)):
        return UsageError(f"there is no flag {flag}: use {ours}")
    near = _near(flag.lstrip("-"), {opt.lstrip("-"): opt for opt in known if opt[:2] == "--"})
    hint = f"Did you mean {near}?" if near else f"'{context.command_path} --help' shows its flags."
    return UsageError(f"there is no flag {flag}", hint=hint)


def unknown_command(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown command, with the command to use."""
    if name in _COMMANDS:
        return UsageError(f"there is no command {name!r}: use 'mixchat {_COMMANDS[name]}'")
    near = _near(name, {each: each for each in known})
    hint = f"Did you mean 'mixchat {near}'?" if near else "'mixchat --help' shows all commands."
    return UsageError(f"there is no command {name!r}", hint=hint)


def _near(word: str, known: Mapping[str, str]) -> str | None:
    near = get_close_matches(word.lower(), known, 1, _NEAR_RATIO) if len(word) > 1 else []
    return known[near[0]] if near else None
