"""A server on a free port in front of a scripted model, and clients for it."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from fake_serve import main as fake_serve_main
from forked_program import ForkedProgram
from patience import PATIENCE_S
from scripted_model import scripted_model

from mixchat.experts.workers.address import resolve
from mixchat.serving.web.access import Access, bind
from mixchat.serving.web.app import AppState, create_app
from mixchat.serving.web.bodies import RequestMemory
from mixchat.serving.web.served_models import ServedModels
from mixchat.serving.web.server import WebServer


@dataclass
class Served:
    """A server that runs, and what it reported."""

    port: int
    model: Any
    server: WebServer
    reports: list[Exception] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    budget: RequestMemory | None = None
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> Any:
        """The requests that the engine has begun."""
        return self.model.engine.requests

    @property
    def prompt(self) -> str:
        """The text of the last one's prompt."""
        return self.model.tokenizer.decode(self.requests[-1].ids)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def openai(self, **options: Any) -> Any:
        from openai import OpenAI

        given = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        return OpenAI(base_url=f"{self.url}/v1", **given | options)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Starts a server, with options of `scripted_model` and `WebServer`."""
    servers = []

    def start(
        access: Access | None = None,
        limits: dict[str, Any] | None = None,
        page: bool = True,
        models: ServedModels | None = None,
        budget: int = 512_000_000,
        strict: bool = True,
        **options: Any,
    ) -> Served:
        model, reports, notes = scripted_model(**options), [], []
        lines: list[str] = []
        models = models or ServedModels(model, lambda name: model)
        memory = RequestMemory(budget)
        shared = AppState(models, reports.append, notes.append, strict, budget=memory)
        bound = bind(resolve("127.0.0.1:0", any_port=True))
        log = lines.append
        app = create_app(shared, access or Access(), page=page, log=log)
        server = WebServer(app, bound, log=log, **(limits or {}))
        server.start()
        servers.append((server, model))
        return Served(bound.getsockname()[1], model, server, reports, notes, memory, lines)

    yield start
    for server, model in servers:
        model.close()
        server.stop()


@pytest.fixture
def fake_serve() -> Callable[[Sequence[str], Mapping[str, str]], ForkedProgram]:
    """Starts `fake_serve.py` with arguments and an environment."""
    return partial(ForkedProgram, fake_serve_main)


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture
def client(served):
    with served.openai() as client:
        yield client


@pytest.fixture
def lenient(serve):
    """A server as `mixchat serve` starts it without --strict."""
    return serve(strict=False)
