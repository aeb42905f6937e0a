"""The flags of `mixchat run`, and the options that they give."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from mixchat.base.context import Context
from mixchat.base.errors import UsageError
from mixchat.base.option import options_of
from mixchat.base.options import ChatOptions, SamplingOptions, ToolOptions
from mixchat.base.progress import Note
from mixchat.chat.saved.saved_chat import LAST
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import STDIN, read_file
from mixchat.cli.flags.settings import (
    AGAIN,
    CHAT,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPT,
    SAMPLING,
    chosen,
    declared,
    group,
    is_given,
    loading,
    option,
    refuse_together,
    setting,
    settings_of,
)
from mixchat.cli.flags.shell_completion import kept_prompts, saved_chats
from mixchat.serving.client.server_url import ServerURL

if TYPE_CHECKING:
    from mixchat.chat.tools.toolbox import Toolbox
    from mixchat.text.form.output_constraint import OutputConstraint

_RESUME = ("-r", "--resume")
_DASHES = "mixchat.dashes"  # in the context's `meta`
_LONGEST_SHOWN = 60  # characters of a question
# Parameters of `run` for a chat or one answer, not for a file of prompts.
_NOT_FOR_LINES = (
    *(
        "prompt",
        "kept_prompt",
        "file",
        "resume",
        "save",
        "keep_cache",
        "overflow",
        "think",
        "raw",
        "vi",
    ),
    *("as_json", "extract", "stream", "prompt_cache", "verbose", "schema", "grammar"),
    *("mcp", "allow"),
)
_FOR_LINES = ("resume_from", "keep_failed", "parallel")
# Parameters for loading a model, which a server has done.
_FOR_LOADING = (
    *load_flags.LOADING,
    *("context_size", "exact_prompts", "keep_cache", "prompt_cache", "mcp", "allow"),
)
_SAMPLED = tuple(name for name, each in options_of(SamplingOptions).items() if each.usage)


def _check_system_file(path: Path, name: str) -> None:
    if str(path) == STDIN:
        raise UsageError(f"{name} cannot be standard input, which is for the question")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags of `mixchat run`."""

    prompt: list[str] | None = typer.Argument(
        None, metavar="PROMPT", help="The question. Without one, a chat starts."
    )
    model: str | None = load_flags.MODEL_NAME
    server: str | None = setting(
        "--server URL",
        "Let a server with OpenAI's API answer, such as 'mixchat serve', at HOST[:PORT] or a URL.",
        MODEL,
        # "" is none, whatever config.toml has.
        check=lambda text, name: text and ServerURL.parse(text),
        show_default="none",
    )
    file: list[str] | None = option(
        "-f --file FILE|URL",
        f"Put the text of FILE, also of a PDF or web page, before the question (-: standard input);"
        f" {AGAIN}.",
        PROMPT,
        path_type=str,  # a Path takes a slash out of https://
    )
    kept_prompt: str | None = option(
        "--prompt NAME",
        "Ask prompts/NAME.md of the config's directory, with the input in place of {{input}}.",
        PROMPT,
        autocompletion=kept_prompts,
    )
    system: str | None = declared(ChatOptions, "system", PROMPT)
    system_file: Path | None = setting(
        "--system-file FILE", "Read the system prompt from FILE.", PROMPT, check=_check_system_file
    )
    jsonl: str | None = option(
        "--jsonl FILE",
        'Answer each line of FILE (-: standard input), a JSON object with "prompt" or "messages".',
        PROMPT,
    )
    resume_from: Path | None = option(
        "--resume-from OUT",
        "Add the answers of --jsonl to OUT, and leave out the lines that are answered there.",
        PROMPT,
    )
    keep_failed: bool = option(
        "--keep-failed", "With --resume-from, do not try failed lines again.", PROMPT
    )
    sampling: Mapping[str, Any] = group(
        SamplingOptions, SAMPLING, *_SAMPLED, shown="the model's, else {:g}"
    )
    answer: Mapping[str, Any] = group(ChatOptions, OUTPUT, "max_tokens", "stop", "think")
    schema: str | None = option(
        "--schema FILE|JSON",
        "Hold each answer to this JSON schema; ask for JSON in the PROMPT, too.",
        OUTPUT,
    )
    grammar: Path | None = option(
        "--grammar FILE",
        "Hold each answer to a grammar, in llguidance's Lark (.lark) or llama.cpp's GBNF (.gbnf).",
        OUTPUT,
    )
    raw: bool = setting("--raw/--no-raw", "Show answers as plain text, not as Markdown.", OUTPUT)
    as_json: bool = option(
        "--json", "Print JSON, for programs, with token ids, counts and times.", OUTPUT
    )
    extract: bool = option("-x --extract", "Print only the first code block.", OUTPUT)
    stream: bool = setting(
        "--stream/--no-stream",
        "Print the answer while it is generated, not at its end.",
        OUTPUT,
        True,
    )
    quiet: bool = setting(
        "-q --quiet/--no-quiet", "Print no notes on standard error, only errors.", OUTPUT
    )
    verbose: bool = setting(
        "--verbose/--no-verbose", "Print speeds and expert cache figures after each answer.", OUTPUT
    )
    load: Mapping[str, Any] = loading(
        *load_flags.LOADING, "context_size", "parallel", "exact_prompts", parallel=4
    )
    prompt_cache: Path | None = option(
        "--prompt-cache FILE",
        "Save the KV cache in FILE, so that the next run processes only what is new.",
        MEMORY,
    )
    chat: Mapping[str, Any] = group(ChatOptions, CHAT, "overflow")
    tools: Mapping[str, Any] = group(ToolOptions, CHAT, "mcp", "allow")
    resume: str | None = option(
        "-r --resume [ID]",
        "Resume the chat of this ID or name, by default the last one.",
        CHAT,
        autocompletion=saved_chats,
    )
    save: bool = setting("--save/--no-save", "Save chats and the input history.", CHAT, True)
    keep_cache: bool = setting(
        "--keep-cache/--no-keep-cache",
        "Save a chat's KV cache with it, so that it resumes without prompt processing.",
        CHAT,
    )
    vi: bool = setting("--vi/--no-vi", "Use vi's keys at the prompt.", CHAT)


class RunCommand(TyperCommand):
    """Accepts `--resume` without a value, and notes a `--`, which makes all words the PROMPT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_DASHES] = "--" in args
        return super().parse_args(ctx, with_last_chat(args))


def with_last_chat(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a value for each bare `--resume`."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    for index in range(end):
        following = words[index + 1 : index + 2]
        if words[index] in _RESUME and (not following or following[0].startswith("-")):
            words[index] = f"--resume={LAST}"
    return words


def check_run_flags(context: typer.Context, flags: RunFlags) -> None:
    """Raise `UsageError` for flags that exclude each other."""
    _check_first_word(context, flags.prompt or [])
    if flags.jsonl is not None:
        refuse_together(context, "--jsonl", _NOT_FOR_LINES)
        if flags.keep_failed and flags.resume_from is None:
            raise UsageError("--keep-failed needs --resume-from OUT")
    elif only := next((name for name in _FOR_LINES if is_given(context, name)), None):
        raise UsageError(f"--{only.replace('_', '-')} needs --jsonl FILE")
    if flags.server:
        hint = "Give them to the server; or leave --server out, to load a model here."
        refuse_together(context, "--server", _FOR_LOADING, hint)


def chat_options(context: typer.Context, flags: RunFlags, size: Context, note: Note) -> ChatOptions:
    """Return the options of answers.

    Raises `UsageError` for two system prompts, and `PromptError` for a bad file of one.
    """
    settings = settings_of(context.command)
    setting = chosen(context, settings["system"], settings["system-file"])
    system: Any = None if setting is None else context.params[setting.name]
    if setting is not None and setting.name == "system_file":
        system = read_file(Path(os.path.expanduser(system)), size, note)
    options = ChatOptions(
        sampling=flags.sampling, system=system or None, **flags.answer, **flags.chat
    )
    hides = flags.quiet and options.think == "show"
    return replace(options, think="hide") if hides else options


def given_settings(context: typer.Context) -> list[str]:
    """Return the settings of a saved chat that this run's flags replace."""
    flags = {name: name for name in ("system", *_SAMPLED)} | {"system_file": "system"}
    return [name for flag, name in flags.items() if is_given(context, flag)]


def read_form(flags: RunFlags, note: Note) -> OutputConstraint | None:
    """Return the form of --schema or --grammar. Raises `UsageError` with the place of a fault."""
    if flags.schema is not None and flags.grammar is not None:
        raise UsageError("--schema and --grammar exclude each other")
    from mixchat.text.form.output_constraint import read_grammar, read_schema

    if flags.schema is not None:
        return read_schema(flags.schema, note)
    return None if flags.grammar is None else read_grammar(flags.grammar, note)


def open_tools(flags: RunFlags, note: Note) -> Toolbox | None:
    """Start the servers of --mcp, and return their tools.

    Raises `UsageError` for a bad file, and `MissingDependencyError` without the package of MCP.
    """
    path = flags.tools.get("mcp")
    if path is None:
        return None
    from mixchat.chat.tools.mcp_servers import MCPServers
    from mixchat.chat.tools.server_file import read_servers
    from mixchat.chat.tools.toolbox import Toolbox

    return Toolbox(MCPServers(read_servers(path), note), flags.tools.get("allow", ()))


def _check_first_word(context: typer.Context, words: Sequence[str]) -> None:
    """Refuse a model's name as the first word of the PROMPT, as in `ollama run`.

    It is accepted after a `--`, or if a model, chat or server is named.
    """
    from mixchat.install.models import is_model

    # The name was asked of the default model, or ended with an error about that one.
    named = any(is_given(context, name) for name in ("model", "resume", "server"))
    if not words or named or context.meta[_DASHES] or not is_model(words[0]):
        return
    name = words[0]
    question = shlex.join(words[1:])
    if len(question) > _LONGEST_SHOWN:
        question = "PROMPT"
    meant = f"run -m {name} {question}".rstrip()
    literal = f"run -- {name} {question}".rstrip()
    raise UsageError(
        f"{name} is the name of a model; did you mean -m {name}?",
        hint=f"Run: mixchat {meant} (or, to ask just that: mixchat {literal})",
    )
