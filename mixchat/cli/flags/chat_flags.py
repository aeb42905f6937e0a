"""The flags of a chat and of its output, and `--resume`, whose value may be left out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mixchat.base.errors import UsageError
from mixchat.chat.parameters import OVERFLOWS, checked_overflow
from mixchat.chat.saved.chat_file import LAST
from mixchat.cli.flags.config_flag import AGAIN, is_given, refuse_together, setting
from mixchat.cli.flags.shell_completion import one_of, saved_chats
from mixchat.serving.client.server_url import ServerURL

if TYPE_CHECKING:
    from mixchat.text.form.output_constraint import OutputConstraint

_RESUME = ("-r", "--resume")
_DASHES = "mixchat.dashes"  # in the context's `meta`
_SHOWN = 60  # characters of a question


def _checked_overflow(text: str) -> None:
    checked_overflow(text, "--overflow")


def _checked_server(text: str) -> None:
    if text:  # an empty one is none, whatever config.toml has
        ServerURL.parse(text)


File = Annotated[
    list[Path] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="FILE",
        help=f"Put the text of FILE before the question (-: standard input); {AGAIN}.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        *_RESUME,
        metavar="[ID]",
        autocompletion=saved_chats,
        help="Resume a saved chat by its ID or name; without one, the last.",
    ),
]
Save = Annotated[
    bool,
    setting(
        "--save/--no-save",
        show_default="on",
        help="Save chats, and the input history.",
    ),
]
KeepCache = Annotated[
    bool,
    setting(
        "--keep-cache/--no-keep-cache",
        show_default=False,
        help="Save a chat's KV cache with it, so that it resumes without prompt processing.",
    ),
]
Overflow = Annotated[
    str,
    setting(
        "--overflow",
        check=_checked_overflow,
        autocompletion=one_of(*OVERFLOWS),
        metavar="POLICY",
        help="When the context is full: stop, or drop-oldest to drop the oldest turns.",
    ),
]
Raw = Annotated[
    bool,
    setting(
        "--raw/--no-raw",
        show_default=False,
        help="Show answers as plain text, without formatting their Markdown.",
    ),
]
Vi = Annotated[
    bool, setting("--vi/--no-vi", show_default=False, help="Vi key bindings at the prompt.")
]
Server = Annotated[
    str | None,
    setting(
        "--server",
        check=_checked_server,
        metavar="URL",
        help="Let a server answer that has OpenAI's API, such as 'mixchat serve': HOST[:PORT] or a "
        "URL. -m names one of its models. MIXCHAT_API_KEY is the variable for its key.",
        show_default="none; the first of its models",
    ),
]
JSONLines = Annotated[
    str | None,
    typer.Option(
        "--jsonl",
        metavar="FILE",
        help='Answer each line of FILE (-: standard input), a JSON object with a "prompt" or '
        '"messages", perhaps an "id", and fields that \'mixchat serve\' takes. Several are '
        "answered at once; the answers are printed in order, a JSON object a line.",
    ),
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(
        "--resume-from",
        metavar="OUT",
        help="With --jsonl: add the answers to the file OUT, and leave out the lines that are "
        "answered in it. The same command continues what was cut off, and tries lines again that "
        "failed: the last answer of a line counts.",
    ),
]
KeepFailed = Annotated[
    bool,
    typer.Option(
        "--keep-failed", help="With --resume-from: do not try lines again that failed in OUT."
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the answer as JSON, with token ids, counts and times."),
]
Extract = Annotated[
    bool, typer.Option("-x", "--extract", help="Print only the first code block of the answer.")
]
Stream = Annotated[
    bool,
    setting(
        "--stream/--no-stream",
        show_default="on",
        help="Print the answer while it is generated, not at its end.",
    ),
]
Quiet = Annotated[
    bool,
    setting(
        "-q",
        "--quiet/--no-quiet",
        show_default=False,
        help="Print only errors on standard error.",
    ),
]


Schema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON",
        help="Hold each answer to this JSON schema, in a file or on the command line; ask for JSON "
        "in the PROMPT, too. Blanks between two parts are at most a new line and 20 more.",
    ),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Hold each answer to a grammar: Lark as llguidance reads it (.lark), or llama.cpp's "
        "GBNF (.gbnf). With another ending, the text decides. llama.cpp's server takes GBNF alone.",
    ),
]


class RunCommand(TyperCommand):
    """Accepts `--resume` without a value, at the end or before another flag.

    It also records whether there was a `--`: all words behind one are the PROMPT.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_DASHES] = "--" in args
        return super().parse_args(ctx, with_last_chat(args))


# Of a chat, or of one answer.
_NOT_OF_LINES = (
    *("prompt", "file", "resume", "save", "keep_cache", "overflow", "raw", "vi"),
    *("as_json", "extract", "stream", "prompt_cache", "trace", "verbose", "schema", "grammar"),
)
_OF_LINES = ("resume_from", "keep_failed", "parallel")


def check_lines(context: typer.Context) -> None:
    """Raise `UsageError` for flags that do not go with `--jsonl`, or only with it."""
    if context.params["jsonl"] is not None:
        refuse_together(context, "--jsonl", _NOT_OF_LINES)
        if context.params["keep_failed"] and context.params["resume_from"] is None:
            raise UsageError("--keep-failed needs --resume-from OUT")
    elif only := next((name for name in _OF_LINES if is_given(context, name)), None):
        raise UsageError(f"--{only.replace('_', '-')} needs --jsonl FILE")


def check_first_word(context: typer.Context, words: Sequence[str]) -> None:
    """Raise `UsageError` where the first word of the PROMPT is a model's name, as for `ollama run`.

    It is accepted in quotes with other words, behind a `--`, or where a model, chat or server is
    named.
    """
    from mixchat.weights.models import is_model

    named = any(is_given(context, name) for name in ("model", "resume", "server"))
    if not words or named or context.meta[_DASHES] or not is_model(words[0]):
        return
    name, question = words[0], shlex.join(words[1:])
    if len(question) > _SHOWN:
        question = "PROMPT"
    meant, literal = f"run -m {name} {question}".rstrip(), f"run -- {name} {question}".rstrip()
    raise UsageError(
        f"{name} is the name of a model; did you mean -m {name}?",
        hint=f"Run: mixchat {meant} (or, to ask just that: mixchat {literal})",
    )


def read_form(schema: str | None, grammar: Path | None) -> OutputConstraint | None:
    """Return the form of --schema or --grammar, None without one.

    Raises `UsageError` with the place of what cannot be read or met.
    """
    if schema is not None and grammar is not None:
        raise UsageError("--schema and --grammar exclude each other")
    from mixchat.text.form.output_constraint import read_grammar, read_schema

    if schema is not None:
        return read_schema(schema)
    return None if grammar is None else read_grammar(grammar)


def with_last_chat(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with a value for each `--resume` that has none."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    for place in range(end):
        following = given[place + 1 : place + 2]
        if given[place] in _RESUME and (not following or following[0].startswith("-")):
            given[place] = f"--resume={LAST}"
    return given
