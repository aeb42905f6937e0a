"""Answers to other programs' flags and commands, and to misspelled words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mixchat.base.errors import UsageError

_NEAR_RATIO = 0.65  # of difflib, by which `temprature` is near, unlike `threads` and `stream`
# Flags of ollama, llama.cpp and llm, by the answer. A command that lacks the answer's first flag
# does not give it.
_FLAGS_BY_ANSWER = {
    "Experts go to the GPU by themselves; see --device-memory.": (
        "-ngl --ngl --gpu-layers --n-gpu-layers --num-gpu -ncmoe --n-cpu-moe -cmoe --cpu-moe -ot"
    ),
    "--device cuda:0,cuda:1 chooses the GPUs, --device-memory 12GB,8GB their shares.": (
        "-ts --tensor-split -mg --main-gpu --split-mode"
    ),
    "--host-memory says how much RAM experts may take.": "--mlock --no-mmap",
    "--ctx-size N sets the context; 'mixchat run --resume' continues the last chat.": (
        "-c --ctx --num-ctx --n-ctx --context"
    ),
    "The threads are chosen by themselves; the variable OMP_NUM_THREADS sets their number.": (
        "-t --threads --num-thread"
    ),
    "--kv-bits 8 halves the KV cache.": "-ctk -ctv --cache-type-k --cache-type-v",
    "A PROMPT needs no flag: mixchat run 'What is a mixture?'": "-p --prompt",
    "'mixchat download ORG/NAME' installs a model of the hub; -m ORG/NAME then names it.": (
        "-hf -hfr --hf-repo"
    ),
    "--system TEXT is the system prompt.": "-sys --system-prompt",
    "--max-tokens N limits the answer.": "--predict --n-predict --num-predict",
    "--parallel N answers so many at once.": "-np --num-parallel",
    "--schema holds an answer to a schema.": "-j --json-schema --format",
    "--grammar FILE holds an answer to a grammar.": "--grammar-file",
    "--worker HOST computes experts on another machine.": "--rpc",
    "'mixchat serve' keeps a model loaded.": "--keepalive",
    "Each option is a flag of its own, as in --temp 0.2.": "-o",
    "'mixchat --version' prints the version, --verbose speeds.": "-v -V",
    "'mixchat run' without a PROMPT is a chat.": "-i -it -cnv",
}
_FLAGS = {flag: answer for answer, flags in _FLAGS_BY_ANSWER.items() for flag in flags.split()}
# Click would read these as -h or -n with a value.
_NEVER_OURS = [flag for flag in _FLAGS if re.fullmatch(r"-\w{2,}", flag)]
_COMMANDS_BY_ANSWER = {
    "'mixchat --version' prints the version.": "version",
    "'mixchat run' is a chat, or one answer.": "chat prompt ask cli",
    "'mixchat run -m demo' is a chat with the demo model.": "demo",
    "A model is loaded as long as its 'mixchat run' or 'serve' runs; see 'mixchat list'.": "ps",
    "Ctrl-C ends 'mixchat run' and 'mixchat serve', and frees their memory.": "stop",
    "'mixchat chats' lists the saved chats.": "logs",
    "'mixchat list' shows the installed models.": "models",
    "'mixchat serve' answers over HTTP.": "server",
    "'mixchat download' installs a model.": "install get import create",
    "'mixchat rm' removes a model.": "remove delete uninstall",
    "A model is quantized when it is installed: see 'mixchat download --help'.": "quantize",
}
_COMMANDS = {
    name: answer for answer, names in _COMMANDS_BY_ANSWER.items() for name in names.split()
}


def refuse_foreign_flags(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for another program's flag that click would misread."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in own:
        if flag in _NEVER_OURS:
            raise UsageError(f"there is no flag {flag}", hint=_FLAGS[flag])


def unknown_flag(flag: str, context: Any) -> UsageError:
    """Return the error for a flag that a command lacks, with the best hint."""
    parameters = context.command.params
    known = [opt for each in parameters for opt in (*each.opts, *each.secondary_opts)]
    answer = _FLAGS.get(flag)
    if answer is not None and (named := re.match(r"--[a-z-]+", answer)) and named[0] not in known:
        answer = None
    if answer is None:
        near = _near(flag.lstrip("-"), {opt.lstrip("-"): opt for opt in known if opt[:2] == "--"})
        answer = (
            f"Did you mean {near}?" if near else f"'{context.command_path} --help' shows its flags."
        )
    return UsageError(f"there is no flag {flag}", hint=answer)


def unknown_command(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown command, with the best hint."""
    near = _near(name, {each: each for each in known})
    answer = f"Did you mean 'mixchat {near}'?" if near else "'mixchat --help' shows all commands."
    return UsageError(f"there is no command {name!r}", hint=_COMMANDS.get(name, answer))


def _near(word: str, known: Mapping[str, str]) -> str | None:
    found = get_close_matches(word.lower(), known, 1, _NEAR_RATIO) if len(word) > 1 else []
    return known[found[0]] if found else None
