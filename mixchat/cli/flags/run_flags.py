"""The flags of `mixchat run` alone, and the options that they give."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.model_config import Context
from mixchat.chat import parameters
from mixchat.chat.parameters import OVERFLOWS, THINKS, checked_word
from mixchat.chat.plain_text import read_text_file
from mixchat.chat.saved.chat_file import LAST
from mixchat.cli.flags.arguments import STDIN, checked
from mixchat.cli.flags.load_flags import expanded, within_limits
from mixchat.cli.flags.settings import (
    AGAIN,
    CHAT,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPT,
    SAMPLING,
    HeadedCommand,
    chosen,
    is_given,
    option,
    refuse_together,
    setting,
    settings_of,
)
from mixchat.cli.flags.shell_completion import one_of, saved_chats
from mixchat.serving.client.server_url import ServerURL
from mixchat.sessions.provider import ChatOptions

if TYPE_CHECKING:
    from mixchat.text.form.output_constraint import OutputConstraint

_RESUME = ("-r", "--resume")
_DASHES = "mixchat.dashes"  # in the context's `meta`
_LONGEST_SHOWN = 60  # characters of a question
# Parameters of `run` for a chat or one answer, not for a file of prompts.
_NOT_FOR_LINES = (
    *("prompt", "file", "resume", "save", "keep_cache", "overflow", "think", "raw", "vi"),
    *("as_json", "extract", "stream", "prompt_cache", "trace", "verbose", "schema", "grammar"),
)
_FOR_LINES = ("resume_from", "keep_failed", "parallel")
# Parameters for loading a model, which a server has done.
_FOR_LOADING = (
    *("ctx_size", "keep_cache", "kv_bits", "exact_prompts", "host_memory", "device_memory"),
    *("device", "worker", "key_file", "cache_policy", "prompt_cache", "trace"),
)
# The options of sampling, which are parameters of `run`, too.
_SAMPLED = tuple(number.field for number in parameters.SAMPLING.values())


def _check_stops(texts: list[str]) -> None:
    for text in texts:
        checked(text, "--stop")


def _check_system(text: str) -> None:
    if text:
        checked(text, "--system")


def _check_system_file(path: Path) -> None:
    if str(path) == STDIN:
        raise UsageError("--system-file cannot be standard input, which is for the question")


def _check_overflow(text: str) -> None:
    checked_word(OVERFLOWS, "--overflow", text)


def _check_think(text: str) -> None:
    checked_word(THINKS, "--think", text)


def _check_server(text: str) -> None:
    if text:  # an empty one is none, whatever config.toml has
        ServerURL.parse(text)


File = Annotated[
    list[Path] | None,
    option(
        "-f --file FILE",
        f"Put the text of FILE before the question (-: standard input); {AGAIN}.",
        PROMPT,
    ),
]
Server = Annotated[
    str | None,
    setting(
        "--server URL",
        "Let a server answer that has OpenAI's API, such as 'mixchat serve': HOST[:PORT] or a "
        "URL. -m names one of its models. MIXCHAT_API_KEY is the variable for its key.",
        MODEL,
        check=_check_server,
        show_default="none; the first of its models",
    ),
]
System = Annotated[
    str | None,
    setting(
        "-s --system TEXT", "System prompt; an empty one removes it.", PROMPT, check=_check_system
    ),
]
SystemFile = Annotated[
    Path | None,
    setting(
        "--system-file FILE",
        "Take the system prompt from FILE, in place of --system.",
        PROMPT,
        check=_check_system_file,
    ),
]
# Without a flag, generation_config.json decides, then the engine.
Temperature = Annotated[
    float | None,
    setting(
        "--temp --temperature X",
        "Sampling temperature; 0 is greedy.",
        SAMPLING,
        check=within_limits("temperature"),
        show_default="the model's, else 0.7",
    ),
]
TopP = Annotated[
    float | None,
    setting(
        "--top-p X",
        "Sample from the smallest set of tokens whose probabilities sum to X.",
        SAMPLING,
        check=within_limits("top_p"),
        show_default="the model's, else 1",
    ),
]
TopK = Annotated[
    int | None,
    setting(
        "--top-k N",
        "Sample from the N most likely tokens; 0: from all.",
        SAMPLING,
        check=within_limits("top_k"),
        show_default="the model's, else 0",
    ),
]
MinP = Annotated[
    float | None,
    setting(
        "--min-p X",
        "Drop tokens less likely than X times the most likely one.",
        SAMPLING,
        check=within_limits("min_p"),
        show_default="the model's, else 0",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    setting(
        "--repeat-penalty X",
        "Penalty for tokens that occur among the last 64; 1: none.",
        SAMPLING,
        check=within_limits("repeat_penalty"),
        show_default="the model's, else 1",
    ),
]
Seed = Annotated[
    int | None,
    setting(
        "--seed N",
        "The same seed gives the same answers to the same questions, with the same settings "
        "on the same machine; after --resume or --prompt-cache only with --exact-prompts.",
        SAMPLING,
        check=within_limits("seed"),
        show_default="random",
    ),
]
MaxTokens = Annotated[
    int | None,
    setting(
        "-n --max-tokens N",
        "Maximum length of an answer in tokens; 0: as many as fit.",
        OUTPUT,
        check=within_limits("max_tokens"),
        show_default="the model's, else a quarter of the context",
    ),
]
Stop = Annotated[
    list[str] | None,
    setting("--stop TEXT", f"End the answer before TEXT; {AGAIN}.", OUTPUT, check=_check_stops),
]
Schema = Annotated[
    str | None,
    option(
        "--schema FILE|JSON",
        "Hold each answer to this JSON schema, in a file or on the command line; ask for JSON "
        "in the PROMPT, too. Blanks between two parts are at most a new line and 20 more.",
        OUTPUT,
    ),
]
Grammar = Annotated[
    Path | None,
    option(
        "--grammar FILE",
        "Hold each answer to a grammar: Lark as llguidance reads it (.lark), or llama.cpp's "
        "GBNF (.gbnf). For other suffixes the format is detected. llama.cpp's server takes GBNF "
        "alone.",
        OUTPUT,
    ),
]
Overflow = Annotated[
    str,
    setting(
        "--overflow POLICY",
        "When the context is full: stop, or drop-oldest to drop the oldest turns.",
        CHAT,
        check=_check_overflow,
        autocompletion=one_of(*OVERFLOWS),
    ),
]
Think = Annotated[
    str,
    setting(
        "--think MODE",
        "If the model thinks before it answers: show it faintly until the answer begins, hide it, "
        "or off to ask for none. In pipes and with -q it is left out.",
        OUTPUT,
        check=_check_think,
        autocompletion=one_of(*THINKS),
    ),
]
Resume = Annotated[
    str | None,
    option(
        "-r --resume [ID]",
        "Resume a saved chat by its ID or name; without one, the last.",
        CHAT,
        autocompletion=saved_chats,
    ),
]
Save = Annotated[
    bool, setting("--save/--no-save", "Save chats, and the input history.", CHAT, show_default="on")
]
KeepCache = Annotated[
    bool,
    setting(
        "--keep-cache/--no-keep-cache",
        "Save a chat's KV cache with it, so that it resumes without prompt processing.",
        CHAT,
        show_default=False,
    ),
]
Raw = Annotated[
    bool,
    setting(
        "--raw/--no-raw",
        "Show answers as plain text, without formatting their Markdown.",
        OUTPUT,
        show_default=False,
    ),
]
Vi = Annotated[
    bool, setting("--vi/--no-vi", "Vi key bindings at the prompt.", CHAT, show_default=False)
]
AnswerAsJson = Annotated[
    bool, option("--json", "Print the answer as JSON, with token ids, counts and times.", OUTPUT)
]
Extract = Annotated[
    bool, option("-x --extract", "Print only the first code block of the answer.", OUTPUT)
]
JSONLines = Annotated[
    str | None,
    option(
        "--jsonl FILE",
        'Answer each line of FILE (-: standard input), a JSON object with a "prompt" or '
        '"messages", perhaps an "id", and fields that \'mixchat serve\' takes. Several are '
        "answered at once; the answers are printed in order, a JSON object a line.",
        PROMPT,
    ),
]
ResumeFrom = Annotated[
    Path | None,
    option(
        "--resume-from OUT",
        "With --jsonl: add the answers to the file OUT, and leave out the lines that are "
        "answered in it. The same command resumes an interrupted run, and tries lines again that "
        "failed: the last answer of a line counts.",
        PROMPT,
    ),
]
KeepFailed = Annotated[
    bool,
    option(
        "--keep-failed", "With --resume-from: do not try lines again that failed in OUT.", PROMPT
    ),
]
PromptCache = Annotated[
    Path | None,
    option(
        "--prompt-cache FILE",
        "Save the KV cache in FILE; the next run then processes only what is new. An existing "
        "FILE is replaced only if it is a prompt cache.",
        MEMORY,
    ),
]
Stream = Annotated[
    bool,
    setting(
        "--stream/--no-stream",
        "Print the answer while it is generated, not at its end.",
        OUTPUT,
        show_default="on",
    ),
]
Quiet = Annotated[
    bool,
    setting(
        "-q --quiet/--no-quiet", "Print only errors on standard error.", OUTPUT, show_default=False
    ),
]
Verbose = Annotated[
    bool,
    setting(
        "--verbose/--no-verbose",
        "Print speeds and expert cache figures after each answer.",
        OUTPUT,
        show_default=False,
    ),
]


class RunCommand(HeadedCommand):
    """Accepts `--resume` without a value, and notes a `--`, which makes all words the PROMPT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_DASHES] = "--" in args
        return super().parse_args(ctx, with_last_chat(args))


def with_last_chat(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a value for each bare `--resume`."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    for place in range(end):
        following = given[place + 1 : place + 2]
        if given[place] in _RESUME and (not following or following[0].startswith("-")):
            given[place] = f"--resume={LAST}"
    return given


def check_run_flags(context: typer.Context) -> None:
    """Raise `UsageError` for flags that exclude each other."""
    _check_first_word(context, context.params["prompt"] or [])
    _check_lines(context)
    if context.params["server"]:
        hint = "Give them to the server; or leave --server out, to load a model here."
        refuse_together(context, "--server", _FOR_LOADING, hint)


def chat_options(context: typer.Context, size: Context) -> ChatOptions:
    """Return the options of answers. Raises as `_system_prompt` does."""
    flags = context.params
    think = checked_word(THINKS, "--think", flags["think"])
    return ChatOptions(
        sampling={name: flags[name] for name in _SAMPLED},
        system=_system_prompt(context, size),
        max_tokens=flags["max_tokens"],
        stop=flags["stop"] or [],
        overflow=checked_word(OVERFLOWS, "--overflow", flags["overflow"]),
        think="hide" if flags["quiet"] and think == "show" else think,
    )


def given_settings(context: typer.Context) -> list[str]:
    """Return the settings of a saved chat that this run's flags replace."""
    flags = {name: name for name in ("system", *_SAMPLED)} | {"system_file": "system"}
    return [name for flag, name in flags.items() if is_given(context, flag)]


def read_form(schema: str | None, grammar: Path | None) -> OutputConstraint | None:
    """Return the form of --schema or --grammar. Raises `UsageError` with the place of a fault."""
    if schema is not None and grammar is not None:
        raise UsageError("--schema and --grammar exclude each other")
    from mixchat.text.form.output_constraint import read_grammar, read_schema

    if schema is not None:
        return read_schema(schema)
    return None if grammar is None else read_grammar(grammar)


def _check_first_word(context: typer.Context, words: Sequence[str]) -> None:
    """Refuse a model's name as the first word of the PROMPT, as in `ollama run`.

    It is accepted after a `--`, or if a model, chat or server is named.
    """
    from mixchat.weights.models import is_model

    named = any(is_given(context, name) for name in ("model", "resume", "server"))
    if not words or named or context.meta[_DASHES] or not is_model(words[0]):
        return
    name, question = words[0], shlex.join(words[1:])
    if len(question) > _LONGEST_SHOWN:
        question = "PROMPT"
    meant, literal = f"run -m {name} {question}".rstrip(), f"run -- {name} {question}".rstrip()
    raise UsageError(
        f"{name} is the name of a model; did you mean -m {name}?",
        hint=f"Run: mixchat {meant} (or, to ask just that: mixchat {literal})",
    )


def _check_lines(context: typer.Context) -> None:
    if context.params["jsonl"] is not None:
        refuse_together(context, "--jsonl", _NOT_FOR_LINES)
        if context.params["keep_failed"] and context.params["resume_from"] is None:
            raise UsageError("--keep-failed needs --resume-from OUT")
    elif only := next((name for name in _FOR_LINES if is_given(context, name)), None):
        raise UsageError(f"--{only.replace('_', '-')} needs --jsonl FILE")


def _system_prompt(context: typer.Context, size: Context) -> str | None:
    """Return the system prompt. Raises `UsageError` for two, `PromptError` for a bad file."""
    settings = settings_of(context.command)
    setting = chosen(context, settings["system"], settings["system-file"])
    if setting is None:
        return None
    value = context.params[setting.name]
    if setting.name == "system":
        return value or None
    return read_text_file(expanded(value), size)
