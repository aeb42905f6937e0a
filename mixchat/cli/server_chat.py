"""`mixchat run --server`: opens a chat with a model of a server, and changes the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.model_config import UNKNOWN_CONTEXT, Context
from mixchat.base.options import RequestedSampling
from mixchat.chat.parameters import with_numbers
from mixchat.cli.flags.config_flag import refuse_together
from mixchat.cli.output.print_answer import OutputOptions
from mixchat.cli.output.show_progress import status
from mixchat.serving.client.server_url import ServerURL

if TYPE_CHECKING:
    from mixchat.chat.backend import Overflow
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn, Predict
    from mixchat.cli.model_provider import LineRequest
    from mixchat.serving.client.server_backend import ServerBackend
    from mixchat.serving.client.server_json import ListedModel
    from mixchat.serving.requests.lines import Begin
    from mixchat.text.form.output_constraint import OutputConstraint

KEY_VARIABLE = "MIXCHAT_API_KEY"
# The parameters of `run` that the machine which loads the model decides.
OF_LOADING = (
    "ctx_size",
    "keep_cache",
    "kv_bits",
    "exact_prompts",
    "host_memory",
    "device_memory",
    "device",
    "worker",
    "key_file",
    "cache_policy",
    "prompt_cache",
    "trace",
)


def check_flags(context: typer.Context) -> None:
    """Raise `UsageError` where flags are given that a model has to be loaded for."""
    hint = "Give them to the server; or leave --server out, to load a model here."
    refuse_together(context, "--server", OF_LOADING, hint)


class ServerModels:
    """The `ModelProvider` of a server."""

    def __init__(self, url: str, output: OutputOptions, form: OutputConstraint | None) -> None:
        """Ask the server for its models. Raises `MixchatError` where that fails.

        form: the form of all answers, if any.
        """
        from mixchat.serving.client.server_client import ServerClient

        self.url = ServerURL.parse(url)
        self._form = {} if form is None else form.request_fields()
        self._client = ServerClient(self.url, os.environ.get(KEY_VARIABLE))
        with nullcontext() if output.quiet else status(f"asking {self.url}"):
            self._models = {model.name: model for model in self._client.models()}

    @property
    def names(self) -> list[str]:
        """Return the names of the models, as the server lists them."""
        return list(self._models)

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return a model: the usual one is the first that the server lists."""
        if given is not None:
            return given
        if resumed is not None and resumed.model in self._models:
            return resumed.model
        if not self._models:
            hint = "Name one with -m MODEL, or check the URL."
            raise ModelNotFoundError(f"{self.url} lists no models", hint=hint)
        return self.names[0]

    def context_of(self, name: str) -> Context:
        """Return the context of a model; a large one where the server does not tell."""
        return self._backend(name).context or UNKNOWN_CONTEXT

    def open(
        self,
        name: str,
        *,
        sampling: Mapping[str, float | None],
        system: str | None,
        max_tokens: int | None,
        stop: Sequence[str],
        overflow: Overflow,
    ) -> ChatSession:
        """Return a session with a model. It need not be listed: some servers know other names."""
        from mixchat.chat.session import ChatSession

        return ChatSession(
            self._backend(name),
            system=system,
            sampling=with_numbers(RequestedSampling(), sampling),
            max_tokens=max_tokens,
            stop=stop,
            overflow=overflow,
        )

    @contextmanager
    def lines(self, model: str, request: LineRequest) -> Iterator[tuple[Begin, Context]]:
        from mixchat.serving.requests.lines import LineDefaults, answered_by

        given: dict[str, Any] = {**request.sampling, "max_tokens": request.max_tokens or None}
        fields = {name: value for name, value in given.items() if value is not None}
        if request.stop:
            fields["stop"] = list(request.stop)
        defaults = LineDefaults(fields, request.system)
        begin = answered_by(self._client, self._model(model), defaults, request.parallel)
        yield begin, self.context_of(model)

    def predictor(self, session: ChatSession, name: str) -> Callable[[], None]:
        """Return a function that returns None: nobody knows how fast a server is."""
        return lambda: None

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> ServerCache:
        return ServerCache()

    def changer(
        self,
        saver: ChatSaver,
        open_model: Callable[[str], ChatSession],
        hooks: Callable[[str], tuple[AfterTurn, Predict]],
    ) -> ServerModelChanger:
        return ServerModelChanger(saver, self, open_model, hooks)

    def _backend(self, name: str) -> ServerBackend:
        from mixchat.serving.client.server_backend import ServerBackend

        model = self._model(name)
        return ServerBackend(self._client, model, self._form)

    def _model(self, name: str) -> ListedModel:
        from mixchat.serving.client.server_json import ListedModel

        return self._models.get(name, ListedModel(name))


class ServerModelChanger:
    """The `ChatModels` of a chat with a server; arguments as those of `ModelChanger`."""

    def __init__(
        self,
        saver: ChatSaver,
        models: ServerModels,
        open_model: Callable[[str], ChatSession],
        hooks: Callable[[str], tuple[AfterTurn, Predict]],
    ) -> None:
        self.place = f"on {models.url}"
        self._saver, self._models = saver, models
        self._open, self._hooks = open_model, hooks

    def others(self) -> list[str]:
        return [name for name in self._models.names if name != self._saver.model]

    def check(self, name: str) -> None:
        if name == self._saver.model:
            raise UsageError(f"this chat already has the model {name}")
        if self._models.names and name not in self._models.names:
            hint = "/model shows those that it has."
            raise ModelNotFoundError(f"the server has no model {name!r}", hint=hint)

    def change(self, name: str) -> tuple[AfterTurn, Predict]:
        self._saver.session.take_model(self._open(name))
        self._saver.model = name
        return self._hooks(name)


class ServerCache:
    """The `ChatCache` of a chat with a server, which keeps its KV cache to itself."""

    def __enter__(self) -> ServerCache:
        return self

    def __exit__(self, *error: object) -> None: ...

    def leave_chat(self) -> None: ...

    def enter_chat(self) -> None: ...

    def changing_model(self) -> AbstractContextManager[None]:
        return nullcontext()
