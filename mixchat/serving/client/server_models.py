"""The models of a server, for `mixchat run --server`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import wait
from socket import create_connection
from typing import TYPE_CHECKING

from mixchat.base.context import UNKNOWN_CONTEXT, Context
from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.progress import Reporter, in_background
from mixchat.serving.client.server_url import SERVER_PORT, ServerURL

if TYPE_CHECKING:
    from mixchat.face.reading_time import Predictor
    from mixchat.face.request import ChatModel
    from mixchat.serving.client.server_model import ServerModel
    from mixchat.text.template import Template

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

    def __init__(self, url: str, reporter: Reporter) -> None:
        """Ask the server for its models. Raises `MixchatError` if that fails."""
        from mixchat.serving.client.server_client import ServerClient

        self._url = ServerURL.parse(url)
        self._client = ServerClient(self._url, os.environ.get(KEY_VARIABLE))
        with reporter.status(f"asking {self._url}"):
            self._models = {model.name: model for model in self._client.models()}

    @property
    def place(self) -> str:
        return f"on {self._url}"

    def choose(self, name: str | None, resumed: str | None, *, from_server: bool) -> str:
        """Return a model. The usual one is the first that the server lists."""
        if name is not None:
            return name
        if resumed in self._models:
            return resumed
        if not self._models:
            hint = "Name one with -m MODEL, or check the URL."
            raise ModelNotFoundError(f"{self._url} lists no models", hint=hint)
        return next(iter(self._models))

    def context_of(self, name: str) -> Context:
        """Return a model's context, a large one if the server does not tell."""
        return self.open(name).context or UNKNOWN_CONTEXT

    def prepare(self, name: str) -> bool:
        return False

    def open(
        self,
        name: str,
        least_context: Callable[[Template], int] = lambda template: 0,
        *,
        shown: bool = True,
    ) -> ServerModel:
        """Return a model, which need not be listed."""
        from mixchat.serving.client.server_json import ListedModel
        from mixchat.serving.client.server_model import ServerModel

        return ServerModel(self._client, self._models.get(name, ListedModel(name)))

    def predictor(self, model: ChatModel, name: str) -> Predictor:
        return lambda: None

    def others(self, current: str) -> list[str]:
        return [name for name in self._models if name != current]

    def check(self, name: str, current: str) -> None:
        if name == current:
            raise UsageError(f"this chat already has the model {name}")
        if self._models and name not in self._models:
            hint = "/model shows those that it has."
            raise ModelNotFoundError(f"the server has no model {name!r}", hint=hint)
