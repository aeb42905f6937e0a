"""`mixchat serve` and `mixchat worker`: a model over HTTP, and experts for another machine."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import DEFAULT_POLICY
from mixchat.base.quantities import parse_duration
from mixchat.chat.printing import say
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import AGAIN, SERVER
from mixchat.cli.output.progress import TerminalReporter
from mixchat.serving.client.server_url import SERVER_PORT
from mixchat.sessions.servers import ServeOptions, serve_experts, serve_http

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # an extension's has its own scheme


def serve(
    context: typer.Context,
    model: load_flags.Model = "instruct",
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            rich_help_panel=SERVER,
            help="The address of this machine at which it listens. Any other than this machine's "
            "own loopback needs a key.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="N", rich_help_panel=SERVER, min=0, max=65535, help="Port; 0: a free one."
        ),
    ] = SERVER_PORT,
    parallel: load_flags.Parallel = 4,
    queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=SERVER,
            min=0,
            max=10_000,
            help="Requests that may wait for their turn; further ones are refused (status 429).",
        ),
    ] = 64,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            rich_help_panel=SERVER,
            help="Let web pages of ORIGIN use the server, such as http://localhost:3000 (*: all); "
            f"{AGAIN}.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            rich_help_panel=SERVER,
            envvar="MIXCHAT_API_KEY",
            show_envvar=False,
            help="The key that each request has to carry. Better set it as MIXCHAT_API_KEY, "
            'perhaps from a file, "$(cat FILE)": other users of this machine can see arguments.',
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=SERVER,
            help="Refuse fields of requests that other servers have and that have no effect here, "
            "such as think. Without it, the header x-mixchat-ignored names them.",
        ),
    ] = False,
    shared_prefix: Annotated[
        bool,
        typer.Option(
            "--shared-prefix/--no-shared-prefix",
            rich_help_panel=SERVER,
            help="Compute only once what prompts of all clients begin with. From cached_tokens in "
            "an answer, and from the time it takes, a client learns what others asked.",
        ),
    ] = True,
    page: Annotated[
        bool,
        typer.Option(
            "--page/--no-page",
            rich_help_panel=SERVER,
            help="Show a chat in the browser at the server's address.",
        ),
    ] = True,
    swap: Annotated[
        bool,
        typer.Option(
            "--swap",
            rich_help_panel=SERVER,
            help="Let a request's field model name another installed model, which then replaces "
            "the loaded one.",
        ),
    ] = False,
    sleep_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            rich_help_panel=SERVER,
            help="Give the model's memory back after so long without a request, such as 10m. The "
            "next request loads it again.",
        ),
    ] = None,
    keep_cache: Annotated[
        bool,
        typer.Option(
            "--keep-cache",
            rich_help_panel=SERVER,
            help="Save the KV caches of conversations when the model is unloaded, for the next "
            "time.",
        ),
    ] = False,
    ctx_size: load_flags.ContextSize = None,
    kv_bits: load_flags.KVBits = None,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    worker: load_flags.Worker = None,
    key_file: load_flags.KeyFile = None,
    cache_policy: load_flags.CachePolicy = DEFAULT_POLICY,
) -> None:
    """Serve a model over HTTP to several clients, by the APIs of OpenAI, Anthropic and Ollama.

    Routes: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /v1/messages,
    /api/chat, /api/generate, /tokenize, /detokenize, /health and /metrics. A browser gets a chat at
    /. Ctrl-C or SIGTERM lets running answers end, for 7 seconds at most.
    """
    # Exact prompts make an answer the same whoever else is served.
    load = load_flags.load_options(context.params, exact_prompts=True)
    key = None if api_key is None else _checked_key(api_key)
    origins = tuple(map(_checked_origin, cors or ()))
    if keep_cache and not shared_prefix:
        raise UsageError("--keep-cache saves what --no-shared-prefix does not use again")
    options = ServeOptions(
        host,
        port,
        queue,
        origins,
        key,
        strict,
        shared_prefix,
        page,
        swap,
        None if sleep_after is None else parse_duration(sleep_after),
        keep_cache,
    )
    serve_http(model, load, options, TerminalReporter(), say)


def worker(
    context: typer.Context,
    model: load_flags.Model = "instruct",
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            help="The address of this machine at which it listens, port 7917 by default.",
        ),
    ] = "127.0.0.1",
    key_file: load_flags.KeyFile = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key in the key file, and do no more.")
    ] = False,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    cache_policy: load_flags.CachePolicy = DEFAULT_POLICY,
) -> None:
    """Hold experts for a chat on another machine, and compute them.

    The model has to be installed here, too. 'mixchat run --worker HOST' on the other machine then
    uses the memory and the cores of both. Only those who have the key are served, one chat at a
    time. What travels is encrypted with that key.
    'torchrun -m mixchat run' starts both: rank 0 chats, the others are its workers.
    """
    options = load_flags.load_options(context.params)
    if not new_key:
        serve_experts(model, options, listen, TerminalReporter(), say)
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
