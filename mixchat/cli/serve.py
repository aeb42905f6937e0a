"""`mixchat serve`: one loaded model for every front end, over OpenAI's HTTP API."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import DEFAULT_POLICY, LoadOptions
from mixchat.chat.printing import say
from mixchat.cli.flags import model_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.checks import checked_bits
from mixchat.cli.flags.config_flag import AGAIN
from mixchat.cli.opening import open_service
from mixchat.cli.output.failure import note, print_error
from mixchat.cli.output.print_answer import OutputOptions
from mixchat.serving.client.server_url import SERVER_PORT

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # that of an extension has its own scheme


def serve(
    model: model_flags.Model = "instruct",
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="The address of this machine at which it listens. Any other than this machine's "
            "own loopback needs a key.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0: a free one.")
    ] = SERVER_PORT,
    parallel: model_flags.Parallel = 4,
    queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=10_000,
            help="Requests that may wait for their turn; further ones are refused (status 429).",
        ),
    ] = 64,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of ORIGIN use the server, such as http://localhost:3000 (*: all); "
            f"{AGAIN}.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
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
            help="Refuse fields of requests that other servers have and that have no effect here, "
            "such as think. Without it, the header x-mixchat-ignored names them.",
        ),
    ] = False,
    shared_prefix: Annotated[
        bool,
        typer.Option(
            "--shared-prefix/--no-shared-prefix",
            help="Compute only once what prompts of all clients begin with. From cached_tokens in "
            "an answer, and from the time it takes, a client learns what others asked.",
        ),
    ] = True,
    ctx_size: model_flags.ContextSize = None,
    kv_bits: model_flags.KVBits = None,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    worker: model_flags.Worker = None,
    key_file: model_flags.KeyFile = None,
    cache_policy: model_flags.CachePolicy = DEFAULT_POLICY,
) -> None:
    """Serve a model over OpenAI's HTTP API, to several clients at once.

    Routes: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health and
    /metrics. Ctrl-C or SIGTERM lets running answers end, for 7 seconds at most.
    """
    load = LoadOptions(
        host_memory=model_flags.budget(host_memory),
        device_memory=model_flags.budgets(device_memory),
        context_size=ctx_size,
        kv_bits=checked_bits(kv_bits),
        exact_prompts=True,  # an answer is the same whoever else is served
        parallel=parallel,
        device=device,
        cache_policy=cache_policy,
        workers=tuple(worker or ()),
        key_file=model_flags.key_path(key_file),
    )
    key = None if api_key is None else _checked_key(api_key)
    origins = tuple(map(_checked_origin, cors or ()))
    from mixchat.serving.web.access import Access, bind, find_address, is_loopback, url_of

    address = find_address(host, port, key)
    with bind(address) as bound:
        service, defaults = open_service(
            model, load, queue, OutputOptions(), shared_prefix=shared_prefix
        )
        defaults = replace(defaults, strict=strict)
        from mixchat.serving.requests.forms import forms_of
        from mixchat.serving.web.app import AppState, create_app
        from mixchat.serving.web.server import WebServer, serve_until_signal

        access = Access(key, origins, is_loopback(address))
        app = create_app(AppState(service, defaults, print_error, note, forms_of(service)), access)
        ready = f"{url_of(bound)}: serving {service.name}; Ctrl-C ends it"
        serve_until_signal(WebServer(app, bound), service, lambda: say(ready), note)


def _checked_key(key: str) -> str:
    if not checked(key, "the API key").isascii() or not key.isprintable() or " " in key:
        raise UsageError("the API key has to be printable ASCII without spaces")
    return key


def _checked_origin(origin: str) -> str:
    if origin == "*" or _ORIGIN.fullmatch(origin):
        return origin
    hint = "Write it as a browser does: http://localhost:3000, without a path."
    raise UsageError(f"--cors {checked(origin, '--cors')!r} is no origin", hint=hint)
