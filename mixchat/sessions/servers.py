"""Serves a model over HTTP, or experts to a chat on another machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Reporter
from mixchat.engine.environment import prepare_environment
from mixchat.sessions.opening import find_or_build, open_service

if TYPE_CHECKING:
    from mixchat.experts.workers.server import Server

Say = Callable[[str], None]  # prints a line for a person


@dataclass(frozen=True)
class ServeOptions:
    """The flags of `mixchat serve`."""

    host: str
    port: int
    queue: int
    origins: tuple[str, ...]
    key: str | None
    strict: bool
    shared_prefix: bool
    page: bool


def serve_http(
    model: str, load: LoadOptions, options: ServeOptions, reporter: Reporter, say: Say
) -> None:
    """Serve a model over HTTP until a signal. The port is taken before the model loads."""
    from mixchat.serving.web.access import Access, bind, find_address, is_loopback, url_of

    address = find_address(options.host, options.port, options.key)
    with bind(address) as bound:
        service, defaults = open_service(
            model, load, options.queue, reporter, shared_prefix=options.shared_prefix
        )
        from mixchat.serving.requests.forms import forms_of
        from mixchat.serving.web.app import AppState, create_app
        from mixchat.serving.web.server import WebServer, serve_until_signal

        defaults = replace(defaults, strict=options.strict)
        state = AppState(service, defaults, reporter.error, reporter.note, forms_of(service))
        access = Access(options.key, options.origins, is_loopback(address))
        ready = f"{url_of(bound)}: serving {service.name}; Ctrl-C ends it"
        server = WebServer(create_app(state, access, page=options.page), bound)
        serve_until_signal(server, service, lambda: say(ready), reporter.note)


def serve_experts(model: str, load: LoadOptions, listen: str, reporter: Reporter, say: Say) -> None:
    """Serve a model's experts to one chat after another until Ctrl-C."""
    with _expert_server(model, load, listen, reporter, say) as (server, address):
        say(f"{address}: ready for a chat; Ctrl-C ends it")
        server.serve()


def serve_rank_0(model: str, load: LoadOptions, reporter: Reporter, say: Say) -> None:
    """Serve experts to torchrun's rank 0 until it ends."""
    from mixchat.experts.workers import torchrun

    listen = torchrun.local_address()
    with _expert_server(model, load, listen, reporter, say) as (server, address):
        server.serve(over=torchrun.publish(address))


@contextmanager
def _expert_server(
    model: str, load: LoadOptions, listen: str, reporter: Reporter, say: Say
) -> Iterator[tuple[Server, str]]:
    from mixchat.experts.workers.address import resolve
    from mixchat.experts.workers.key_file import default_key_file, read_key_file

    key = read_key_file(load.key_file or default_key_file())
    address = resolve(listen, any_port=True)
    directory = find_or_build(model, reporter)
    prepare_environment()
    from mixchat.experts.workers.listener import Listener
    from mixchat.experts.workers.server import Server
    from mixchat.loading.served_experts import load_served_experts

    with closing(Listener(address, key, say)) as listener:
        served = load_served_experts(directory, load, reporter.note)
        say(f"{served.name}: room for {served.slots} of {served.placement.experts} experts")
        yield Server(listener, served, say), listener.address
