"""The flags of `mixchat run`, and the options that they give."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from typer.core import TyperCommand

from mixchat.base.context import Context
from mixchat.base.errors import UsageError
from mixchat.base.options import ChatOptions, Overflow, Think
from mixchat.base.progress import Note
from mixchat.chat.parameters import OVERFLOWS, THINKS, checked_word
from mixchat.chat.saved.saved_chat import LAST
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import STDIN, checked, read_file
from mixchat.cli.flags.load_flags import LoadFlags, expanded, within_limits
from mixchat.cli.flags.settings import (
    AGAIN,
    CHAT,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPT,
    SAMPLING,
    chosen,
    is_given,
    option,
    refuse_together,
    setting,
    settings_of,
)
from mixchat.cli.flags.shell_completion import one_of, saved_chats
from mixchat.face import numbers
from mixchat.serving.client.server_url import ServerURL

if TYPE_CHECKING:
    from mixchat.text.form.output_constraint import OutputConstraint

_RESUME = ("-r", "--resume")
_DASHES = "mixchat.dashes"  # in the context's `meta`
_LONGEST_SHOWN = 60  # characters of a question
# Parameters of `run` for a chat or one answer, not for a file of prompts.
_NOT_FOR_LINES = (
    *("prompt", "file", "resume", "save", "keep_cache", "overflow", "think", "raw", "vi"),
    *("as_json", "extract", "stream", "prompt_cache", "verbose", "schema", "grammar"),
)
_FOR_LINES = ("resume_from", "keep_failed", "parallel")
# Parameters for loading a model, which a server has done.
_FOR_LOADING = (
    *(field.name for field in fields(LoadFlags)),
    *("ctx_size", "keep_cache", "exact_prompts", "prompt_cache"),
)
# The options of sampling, which are parameters of `run`, too.
_SAMPLED = tuple(number.field for number in numbers.SAMPLING.values())


def _check_system_file(path: Path) -> None:
    if str(path) == STDIN:
        raise UsageError("--system-file cannot be standard input, which is for the question")


def _sampling(usage: str, field: str, help: str, default: str) -> Any:
    """Return a flag of sampling. `default` is for a model whose makers advise nothing."""
    shown = f"the model's, else {default}"
    return setting(usage, help, SAMPLING, check=within_limits(field), show_default=shown)


@dataclass(frozen=True, kw_only=True)
class RunFlags(LoadFlags):
    """The flags of `mixchat run`."""

    prompt: list[str] | None = typer.Argument(
        None, metavar="PROMPT", help="The question. Without one, a chat starts."
    )
    model: str = load_flags.MODEL_NAME
    server: str | None = setting(
        "--server URL",
        "Let a server with OpenAI's API answer, such as 'mixchat serve', at HOST[:PORT] or a URL.",
        MODEL,
        check=lambda text: text and ServerURL.parse(text),  # "" is none, whatever config.toml has
        show_default="none",
    )
    file: list[Path] | None = option(
        "-f --file FILE",
        f"Put the text of FILE before the question (-: standard input); {AGAIN}.",
        PROMPT,
    )
    system: str | None = setting(
        "-s --system TEXT",
        "System prompt; an empty one removes it.",
        PROMPT,
        check=lambda text: text and checked(text, "--system"),
    )
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
    temperature: float | None = _sampling(
        "--temp --temperature X", "temperature", "Sampling temperature; 0 is greedy.", "0.7"
    )
    top_p: float | None = _sampling(
        "--top-p X",
        "top_p",
        "Sample from the smallest set of tokens whose probabilities sum to X.",
        "1",
    )
    top_k: int | None = _sampling(
        "--top-k N", "top_k", "Sample from the N most likely tokens (0: all).", "0"
    )
    min_p: float | None = _sampling(
        "--min-p X", "min_p", "Drop tokens less likely than X times the most likely one.", "0"
    )
    repeat_penalty: float | None = _sampling(
        "--repeat-penalty X", "repeat_penalty", "Penalty for the last 64 tokens (1: none).", "1"
    )
    seed: int | None = setting(
        "--seed N",
        "Seed of the sampling, which gives the same answer again on the same machine.",
        SAMPLING,
        check=within_limits("seed"),
        show_default="random",
    )
    max_tokens: int | None = setting(
        "-n --max-tokens N",
        "Maximum length of an answer in tokens (0: as many as fit).",
        OUTPUT,
        check=within_limits("max_tokens"),
        show_default="the model's, else a quarter of the context",
    )
    stop: list[str] | None = setting(
        "--stop TEXT",
        f"End the answer before TEXT; {AGAIN}.",
        OUTPUT,
        check=lambda texts: [checked(text, "--stop") for text in texts],
    )
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
    think: str = setting(
        "--think MODE",
        "Show thinking faintly (show), hide it (hide), ask for it (on) or for none (off).",
        OUTPUT,
        "show",
        check=partial(checked_word, THINKS, "--think"),
        autocompletion=one_of(*THINKS),
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
    ctx_size: int | None = load_flags.CONTEXT_SIZE
    parallel: int = load_flags.parallel(4)
    exact_prompts: bool = load_flags.EXACT_PROMPTS
    prompt_cache: Path | None = option(
        "--prompt-cache FILE",
        "Save the KV cache in FILE, so that the next run processes only what is new.",
        MEMORY,
    )
    overflow: str = setting(
        "--overflow POLICY",
        "If the context is full, refuse the question (stop) or drop old turns (drop-oldest).",
        CHAT,
        "stop",
        check=partial(checked_word, OVERFLOWS, "--overflow"),
        autocompletion=one_of(*OVERFLOWS),
    )
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
        system = read_file(expanded(system), size, note)
    hides = flags.quiet and flags.think == "show"
    return ChatOptions(
        sampling={name: getattr(flags, name) for name in _SAMPLED},
        system=system or None,
        max_tokens=flags.max_tokens,
        stop=flags.stop or [],
        overflow=cast("Overflow", flags.overflow),
        think="hide" if hides else cast("Think", flags.think),
    )


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
