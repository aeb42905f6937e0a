"""The models of a server, for `mixchat run --server`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from socket import create_connection
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.model_config import UNKNOWN_CONTEXT, Context
from mixchat.base.options import ChatOptions, RequestedSampling
from mixchat.base.progress import Reporter, in_background
from mixchat.chat.parameters import with_numbers
from mixchat.serving.client.server_url import SERVER_PORT, ServerURL
from mixchat.sessions.provider import Predictor

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.serving.client.server_backend import ServerBackend
    from mixchat.serving.client.server_json import ListedModel
    from mixchat.serving.requests.lines import Begin
    from mixchat.text.form.output_constraint import OutputConstraint

KEY_VARIABLE = "MIXCHAT_API_KEY"
_GLANCE_S = 0.05


def is_served_here(model: str) -> bool:
    """Return whether a server at the usual port here has this model, within 50 ms.

    No key is sent, because any user's program may listen there.
    """
    try:  # before the library for HTTP is imported, which takes longer
        create_connection(("127.0.0.1", SERVER_PORT), _GLANCE_S).close()
    except OSError:
        return False
    from mixchat.serving.client.server_client import ServerClient

    models = in_background(ServerClient(ServerURL.parse(f"127.0.0.1:{SERVER_PORT}")).models)
    wait([models], _GLANCE_S)
    if not models.done() or models.exception() is not None:
        return False
    return any(listed.name == model for listed in models.result())


class ServerModels:
    """The `ModelProvider` of a server."""

    def __init__(self, url: str, form: OutputConstraint | None, reporter: Reporter) -> None:
        """Ask the server for its models. Raises `MixchatError` if that fails."""
        from mixchat.serving.client.server_client import ServerClient

        self._url = ServerURL.parse(url)
        self._form = {} if form is None else form.request_fields()
        self._client = ServerClient(self._url, os.environ.get(KEY_VARIABLE))
        with reporter.status(f"asking {self._url}"):
            self._models = {model.name: model for model in self._client.models()}

    @property
    def place(self) -> str:
        return f"on {self._url}"

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return a model. The usual one is the first that the server lists."""
        if given is not None:
            return given
        if resumed is not None and resumed.model in self._models:
            return resumed.model
        if not self._models:
            hint = "Name one with -m MODEL, or check the URL."
            raise ModelNotFoundError(f"{self._url} lists no models", hint=hint)
        return next(iter(self._models))

    def context_of(self, name: str) -> Context:
        """Return a model's context, a large one if the server does not tell."""
        return self._backend(name).context or UNKNOWN_CONTEXT

    def open(
        self, name: str, options: ChatOptions, resumed: SavedChat | None = None
    ) -> ChatSession:
        """Return a session with a model, which need not be listed."""
        from mixchat.chat.session import ChatSession

        sampling = with_numbers(RequestedSampling(), options.sampling)
        return ChatSession(self._backend(name), sampling, options)

    @contextmanager
    def lines(
        self, name: str, options: ChatOptions, parallel: int
    ) -> Iterator[tuple[Begin, Context]]:
        from mixchat.serving.requests.lines import LineDefaults, answered_by

        given: dict[str, Any] = {**options.sampling, "max_tokens": options.max_tokens or None}
        fields = {name: value for name, value in given.items() if value is not None}
        if options.stop:
            fields["stop"] = list(options.stop)
        defaults = LineDefaults(fields, options.system)
        yield (
            answered_by(self._client, self._model(name), defaults, parallel),
            self.context_of(name),
        )

    def predictor(self, session: ChatSession, name: str) -> Predictor:
        return lambda: None

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> ServerCache:
        return ServerCache()

    def others(self, current: str) -> list[str]:
        return [name for name in self._models if name != current]

    def check(self, name: str, current: str) -> None:
        if name == current:
            raise UsageError(f"this chat already has the model {name}")
        if self._models and name not in self._models:
            hint = "/model shows those that it has."
            raise ModelNotFoundError(f"the server has no model {name!r}", hint=hint)

    def _backend(self, name: str) -> ServerBackend:
        from mixchat.serving.client.server_backend import ServerBackend

        return ServerBackend(self._client, self._model(name), self._form)

    def _model(self, name: str) -> ListedModel:
        from mixchat.serving.client.server_json import ListedModel

        return self._models.get(name, ListedModel(name))


class ServerCache:
    """The `ChatCache` of a server, which keeps its KV cache."""

    def __enter__(self) -> ServerCache:
        return self

    def __exit__(self, *error: object) -> None: ...

    def leave_chat(self) -> None: ...

    def enter_chat(self) -> None: ...

    def changing_model(self) -> AbstractContextManager[None]:
        return nullcontext()
