"""Answers to the flags and commands of other programs, and to words that are misspelled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mixchat.errors import UsageError

_NEAR = 0.65  # of difflib: `temprature` is near, `threads` and `stream` are not
_DEVICES = "--device cuda:0,cuda:1 chooses the GPUs, --device-memory 12GB,8GB their shares."
_EXPERTS = "Experts go to the GPU by themselves; see --device-memory."

# As ollama, llama.cpp and llm have them; a command that lacks the first flag of an answer ignores
# it.
_FLAGS = {
    **dict.fromkeys(("-ngl", "--ngl", "--gpu-layers", "--n-gpu-layers", "--num-gpu"), _EXPERTS),
    **dict.fromkeys(("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe", "-ot"), _EXPERTS),
    **dict.fromkeys(("-ts", "--tensor-split", "-mg", "--main-gpu", "--split-mode"), _DEVICES),
    **dict.fromkeys(("--mlock", "--no-mmap"), "--host-memory says how much RAM experts may take."),
    **dict.fromkeys(("--num-ctx", "--ctx", "--n-ctx", "--context"), "--ctx-size N sets it."),
    "-c": "--ctx-size N sets the context; 'mixchat run --resume' continues the last chat.",
    **dict.fromkeys(
        ("-t", "--threads", "--num-thread"),
        "The threads are chosen by themselves; the variable OMP_NUM_THREADS sets their number.",
    ),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), "See --kv-bits."),
    **dict.fromkeys(("-p", "--prompt"), "A PROMPT needs no flag: mixchat run 'What is a mixture?'"),
    **dict.fromkeys(
        ("-hf", "-hfr", "--hf-repo"),
        "'mixchat download ORG/NAME' installs a model of the hub; -m ORG/NAME then names it.",
    ),
    **dict.fromkeys(("-sys", "--system-prompt"), "--system TEXT is the system prompt."),
    **dict.fromkeys(("--predict", "--n-predict", "--num-predict"), "--max-tokens N limits it."),
    **dict.fromkeys(("-np", "--num-parallel"), "--parallel N answers so many at once."),
    **dict.fromkeys(("-j", "--json-schema", "--format"), "--schema holds an answer to a schema."),
    "--grammar-file": "--grammar FILE holds an answer to a grammar.",
    "--rpc": "--worker HOST computes experts on another machine.",
    "--keepalive": "'mixchat serve' keeps a model loaded.",
    "-o": "Each option is a flag of its own, as in --temp 0.2.",
    **dict.fromkeys(("-v", "-V"), "'mixchat --version' prints the version, --verbose speeds."),
    **dict.fromkeys(("-i", "-it", "-cnv"), "'mixchat run' without a PROMPT is a chat."),
}
# Click would read the others as -h or -n with a value.
_NEVER_OURS = [flag for flag in _FLAGS if re.fullmatch(r"-\w{2,}", flag)]
_COMMANDS = {
    "version": "'mixchat --version' prints the version.",
    **dict.fromkeys(("chat", "prompt", "ask", "cli"), "'mixchat run' is a chat, or one answer."),
    "ps": "A model is loaded as long as its 'mixchat run' or 'serve' runs; see 'mixchat list'.",
    "stop": "Ctrl-C ends 'mixchat run' and 'mixchat serve', and frees their memory.",
    "logs": "'mixchat chats' lists the saved chats.",
    "models": "'mixchat list' shows the installed models.",
    "server": "'mixchat serve' answers over HTTP.",
    **dict.fromkeys(("install", "get", "import", "create"), "'mixchat download' installs a model."),
    **dict.fromkeys(("remove", "delete", "uninstall"), "'mixchat rm' removes a model."),
    "quantize": "A model is rounded when it is installed: see 'mixchat download --help'.",
}


def refuse_foreign_flags(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for a flag of another program that would be read as one of ours."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in own:
        if flag in _NEVER_OURS:
            raise UsageError(f"there is no flag {flag}", hint=_FLAGS[flag])


def unknown_flag(flag: str, context: Any) -> UsageError:
    """Return the error for a flag that a command lacks; its hint is the best answer known."""
    known = [opt for parameter in context.command.params for opt in _opts(parameter)]
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
    """Return the error for a command that does not exist; its hint is the best answer known."""
    near = _near(name, {each: each for each in known})
    answer = f"Did you mean 'mixchat {near}'?" if near else "'mixchat --help' shows all commands."
    return UsageError(f"there is no command {name!r}", hint=_COMMANDS.get(name, answer))


def _opts(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _near(word: str, known: Mapping[str, str]) -> str | None:
    found = get_close_matches(word.lower(), known, 1, _NEAR) if len(word) > 1 else []
    return known[found[0]] if found else None
