"""Serves a model over HTTP, or experts to a chat on another machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Reporter
from mixchat.chat.printing import say
from mixchat.engine.environment import prepare_environment
from mixchat.face.load import check_model, find_or_build, open_model

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.serving.web.served_models import ServedModels


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
    swap: bool
    sleep_after: float | None  # seconds
    keep_caches: bool
    drain: float  # seconds
    aliases: Mapping[str, str]
    log_requests: bool = False


def serve_http(model: str, load: LoadOptions, options: ServeOptions, reporter: Reporter) -> None:
    """Serve a model over HTTP until a signal. The port is taken before the model loads."""
    from mixchat.serving.web.access import Access, bind, find_address, is_loopback, page_url, url_of

    address = find_address(options.host, options.port, options.key)
    with bind(address) as bound, ExitStack() as at_end:
        models = _served_models(model, load, options, reporter)
        from mixchat.serving.web.app import AppState, create_app
        from mixchat.serving.web.request_log import written_aside
        from mixchat.serving.web.server import WebServer, serve_until_signal

        state = AppState(models, reporter.error, reporter.note, options.strict)
        access = Access(options.key, options.origins, is_loopback(address))
        page = f"; a browser opens {page_url(bound)}" if options.page else ""
        ready = f"{url_of(bound)}/v1: serving {models.name}{page}; Ctrl-C ends it"
        size = f"context: {models.context.in_words}"
        log = None
        if options.log_requests:
            log = at_end.enter_context(written_aside(sys.stderr.fileno()))
        app = create_app(state, access, page=options.page, log=log)
        server = WebServer(app, bound, started=models.await_sleep, log=log)
        serve_until_signal(
            server,
            models,
            lambda: say(ready, size),
            reporter.note,
            drain=options.drain,
            saves=options.keep_caches,
        )


def _served_models(
    name: str, load: LoadOptions, options: ServeOptions, reporter: Reporter
) -> ServedModels:
    from mixchat.text.form.output_constraint import HASTY_S

    tokens: dict[str, int] = {}  # of models that were loaded before

    def open_served(name: str) -> Model:
        # Clients rely on the size that they were told, and saved KV caches may need it.
        model = open_model(
            name,
            load,
            reporter,
            least_context=lambda template: tokens.get(name, 0),
            keep_caches=options.keep_caches,
            waiting=options.queue,
            shared_prefix=options.shared_prefix,
            form_seconds=HASTY_S,
        )
        tokens[name] = model.context.tokens
        return model

    first = open_served(name)
    from mixchat.serving.installed_models import InstalledModels
    from mixchat.serving.web.served_models import ServedModels

    installed = InstalledModels(load.context_size)
    other_models = partial(installed.others, name) if options.swap else dict
    models = {name, *other_models()}
    for alias, model in options.aliases.items():
        if model not in models:
            hint = "" if options.swap else "; --swap serves other installed models, too"
            reporter.note(f"--alias {alias}: this server has no model {model!r}{hint}")
    return ServedModels(
        first,
        open_served,
        check=lambda name: check_model(find_or_build(name, reporter), load),
        others=other_models,
        aliases=options.aliases,
        facts=installed.facts,
        sleep_after=options.sleep_after,
        queue=options.queue,
    )


def serve_experts(model: str, load: LoadOptions, listen: str, reporter: Reporter) -> None:
    """Serve a model's experts to one chat after another until Ctrl-C."""
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
        say(f"{listener.address}: ready for a chat; Ctrl-C ends it")
        Server(listener, served, say).serve()
