"""The models of this machine, for `mixchat run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mixchat.base.model_config import Context
from mixchat.base.options import LoadOptions
from mixchat.cli.cache_file import CacheSaver, FileBesideChat, NamedFile
from mixchat.cli.change_model import ModelChanger
from mixchat.cli.opening import context_of, open_service, open_session
from mixchat.cli.output.print_answer import OutputOptions

if TYPE_CHECKING:
    from mixchat.chat.backend import Overflow
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn, ChatModels, Predict
    from mixchat.cli.model_provider import LineRequest
    from mixchat.planning.plan import Prediction
    from mixchat.serving.requests.lines import Begin
    from mixchat.text.form.output_constraint import OutputConstraint


class LocalModels:
    """The `ModelProvider` of models that are loaded here, with the flags of a run.

    usual: the model where none is named; named_file: the file of --prompt-cache.
    """

    def __init__(
        self,
        load: LoadOptions,
        output: OutputOptions,
        form: OutputConstraint | None,
        *,
        usual: str,
        named_file: NamedFile | None,
        keep_cache: bool,
    ) -> None:
        self._load, self._output, self._form, self._usual = load, output, form, usual
        self._named_file, self._keep_cache = named_file, keep_cache

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return a model; the usual one continues a chat with a server's that is unknown here."""
        from mixchat.serving.client.server_backend import ServerBackend
        from mixchat.weights.models import is_model

        if given is not None:
            return given
        if resumed is None or (
            resumed.identity == ServerBackend.identity and not is_model(resumed.model)
        ):
            return self._usual
        return resumed.model

    def context_of(self, name: str) -> Context:
        return context_of(name, self._load.context_size)

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
        return open_session(
            name,
            self._load,
            self._output,
            sampling=sampling,
            system=system,
            max_tokens=max_tokens,
            stop=stop,
            overflow=overflow,
            form=self._form,
        )

    @contextmanager
    def lines(self, model: str, request: LineRequest) -> Iterator[tuple[Begin, Context]]:
        from mixchat.serving.requests.forms import forms_of
        from mixchat.serving.requests.lines import AHEAD, LineDefaults, answered_here
        from mixchat.text.form.output_constraint import PATIENT_S

        load = replace(self._load, exact_prompts=True, parallel=request.parallel)
        queue = AHEAD * request.parallel
        service, advice = open_service(model, load, queue, self._output, request.sampling)
        if request.max_tokens is not None:
            advice = replace(advice, max_tokens=request.max_tokens)
        seed = request.sampling["seed"]
        fields = {"stop": list(request.stop)} | ({} if seed is None else {"seed": seed})
        given = LineDefaults(fields, request.system)
        with closing(service):
            yield (
                answered_here(service, advice, given, forms_of(service, PATIENT_S)),
                self.context_of(model),
            )

    def predictor(self, session: ChatSession, name: str) -> Callable[[], Prediction | None]:
        return _speed_predictor(session, name, self._load.device)

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> CacheSaver:
        strict = self._keep_cache and asks_once
        beside_chat = FileBesideChat(saver, self._keep_cache, strict=strict)
        return CacheSaver(saver.session, self._named_file or beside_chat)

    def changer(
        self,
        saver: ChatSaver,
        open_model: Callable[[str], ChatSession],
        hooks: Callable[[str], tuple[AfterTurn, Predict]],
    ) -> ChatModels:
        return ModelChanger(saver, self._load, open_model, hooks)


def _speed_predictor(
    session: ChatSession, model: str, device: str | None
) -> Callable[[], Prediction | None]:
    from mixchat.loading.loader import speed_predictor
    from mixchat.weights.models import installed_directory

    return speed_predictor(installed_directory(model), device, session.engine)
