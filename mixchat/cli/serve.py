"""`mixchat serve` and `mixchat worker`: a model over HTTP, and experts for another machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import parse_duration
from mixchat.chat.printing import say
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import AGAIN, SERVER, loading, option, setting, value_source
from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.load import recommending
from mixchat.serving.client.server_url import SERVER_PORT
from mixchat.serving.serve import ServeOptions, serve_experts, serve_http

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # an extension's has its own scheme
_MAX_ALIASES, _MAX_NAME_LENGTH = 100, 200  # characters


def parse_aliases(texts: Iterable[str], name: str = "--alias") -> dict[str, str]:
    """Return the models by their aliases, without Ollama's tag. Raises `UsageError`."""
    aliases: dict[str, str] = {}
    for text in texts:
        alias, equals, model = checked(text, name).partition("=")
        alias = alias.removesuffix(":latest")
        names = alias, model
        if not equals or not all(0 < len(each) <= _MAX_NAME_LENGTH for each in names):
            hint = f"Write it like gpt-4o=demo, with {_MAX_NAME_LENGTH} characters a name at most."
            raise UsageError(f"{name} {text!r:.80} is no NAME=MODEL", hint=hint)
        if not text.isprintable():
            raise UsageError(f"{name} {text!r:.80} has characters that cannot be shown")
        if alias in aliases:
            raise UsageError(f"{name} {alias!r:.80} is given twice")
        aliases[alias] = model
    if len(aliases) > _MAX_ALIASES:
        raise UsageError(f"{name} takes {_MAX_ALIASES} names at most, not {len(aliases)}")
    return aliases


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """The flags of `mixchat serve`."""

    model: str | None = load_flags.MODEL_NAME
    host: str = option(
        "--host HOST",
        "Address of this machine to listen at, with a key unless it is localhost.",
        SERVER,
        "127.0.0.1",
    )
    port: int = option(
        "--port N", "Port to listen at (0: a free one).", SERVER, SERVER_PORT, min=0, max=65535
    )
    queue: int = option(
        "--queue N",
        "Requests that may wait; more are refused with status 429.",
        SERVER,
        64,
        min=0,
        max=10_000,
    )
    cors: list[str] | None = option(
        "--cors ORIGIN",
        f"Let web pages of ORIGIN use the server, such as http://localhost:3000 (*: all); {AGAIN}.",
        SERVER,
    )
    api_key: str | None = option(
        "--api-key KEY",
        "Key that each request has to carry; MIXCHAT_API_KEY hides it from other users here.",
        SERVER,
        envvar="MIXCHAT_API_KEY",
        show_envvar=False,
    )
    strict: bool = option(
        "--strict",
        "Refuse requests with fields that have no effect here, instead of naming these in the "
        "header x-mixchat-ignored.",
        SERVER,
    )
    shared_prefix: bool = option(
        "--shared-prefix/--no-shared-prefix",
        "Process only once what prompts of several clients begin with.",
        SERVER,
        True,
    )
    page: bool = option(
        "--page/--no-page", "Show a chat in the browser at the server's address.", SERVER, True
    )
    swap: bool = option(
        "--swap",
        "Let a request name another installed model, which then replaces the loaded one.",
        SERVER,
    )
    alias: list[str] | None = setting(
        "--alias NAME=MODEL",
        f"Let MODEL answer requests for NAME, as in gpt-4o=demo; {AGAIN}.",
        SERVER,
        check=parse_aliases,
    )
    sleep_after: str | None = option(
        "--sleep-after TIME",
        "Unload the model after so long without a request, such as 10m, until the next one.",
        SERVER,
    )
    drain: str = option(
        "--drain TIME",
        "Let running answers end for so long after SIGTERM or Ctrl-C, such as 10m.",
        SERVER,
        "7s",
    )
    keep_cache: bool = option(
        "--keep-cache", "Save the conversations' KV caches while the model is unloaded.", SERVER
    )
    log_requests: bool = option(
        "--log-requests",
        "Print a line for each request, with status, tokens and seconds, and no texts.",
        SERVER,
    )
    load: Mapping[str, Any] = loading(*load_flags.LOADING, "parallel", "context_size", parallel=4)


def serve(context: typer.Context, flags: ServeFlags) -> None:
    """Serve a model over HTTP, with the APIs of OpenAI and others.

    A browser gets a chat at http://127.0.0.1:11435. Programs get OpenAI's /v1/chat/completions,
    /v1/responses and /v1/completions, Anthropic's /v1/messages, and Ollama's /api/chat and
    /api/generate. There are also /v1/models, /tokenize, /detokenize, /health and /metrics.

    To serve other machines, give an address with --host and a key in MIXCHAT_API_KEY, such as
    MIXCHAT_API_KEY="$(cat FILE)". There is no TLS. The beginning that several prompts share is
    processed once. A client can learn from the time and from cached_tokens what others asked,
    unless --no-shared-prefix is given.

    Ctrl-C or SIGTERM closes the port and lets running answers end, for 7 seconds at most. A server
    behind a load balancer gets more with --drain.
    """
    from mixchat.install.models import default_model

    # Exact prompts make an answer the same whoever else is served.
    load = LoadOptions(exact_prompts=True, **flags.load)
    if flags.keep_cache and not flags.shared_prefix:
        raise UsageError("--keep-cache saves what --no-shared-prefix does not use again")
    options = ServeOptions(
        flags.host,
        flags.port,
        flags.queue,
        origins=tuple(map(_checked_origin, flags.cors or ())),
        key=None if flags.api_key is None else _checked_key(flags.api_key),
        strict=flags.strict,
        shared_prefix=flags.shared_prefix,
        page=flags.page,
        swap=flags.swap,
        sleep_after=None if flags.sleep_after is None else parse_duration(flags.sleep_after),
        keep_caches=flags.keep_cache,
        drain=parse_duration(flags.drain),
        aliases=parse_aliases(flags.alias or ()),
        log_requests=flags.log_requests,
    )
    with recommending(value_source(context, "model") != "default"):
        serve_http(flags.model or default_model(), load, options, TerminalReporter())


@dataclass(frozen=True, kw_only=True)
class WorkerFlags:
    """The flags of `mixchat worker`."""

    model: str | None = load_flags.MODEL_NAME
    listen: str = option(
        "--listen HOST[:PORT]",
        "Address of this machine to listen at, port 7917 by default.",
        default="127.0.0.1",
    )
    new_key: bool = option("--new-key", "Write a new key into the key file, and end.")
    load: Mapping[str, Any] = loading(*load_flags.HOLDING)


def worker(context: typer.Context, flags: WorkerFlags) -> None:
    """Hold and compute experts for a chat on another machine.

    'mixchat run --worker HOST' on the other machine then uses the memory and the cores of both. The
    same model has to be installed on both. Make a key with --new-key once, and copy its file to
    both. Only those who have the key are served, one chat at a time, and all traffic is encrypted
    with it.
    """
    options = LoadOptions(**flags.load)
    if not flags.new_key:
        from mixchat.install.models import default_model

        model = flags.model or default_model()
        serve_experts(model, options, flags.listen, TerminalReporter())
        return
    from mixchat.experts.workers.key_file import default_key_file, make_key_file

    path = options.key_file or default_key_file()
    make_key_file(path)
    say(f"wrote {path}: copy it to the other machines, and let nobody else read it")


def _checked_key(key: str) -> str:
    if not checked(key, "the API key").isascii() or not key.isprintable() or " " in key:
        raise UsageError("the API key has to be printable ASCII without spaces")
    return key


def _checked_origin(origin: str) -> str:
    if origin == "*" or _ORIGIN.fullmatch(origin):
        return origin
    hint = "Write it as a browser does: http://localhost:3000, without a path."
    raise UsageError(f"--cors {checked(origin, '--cors')!r} is no origin", hint=hint)
