"""The models of this machine, for `mixchat run` and `serve --swap`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.base.errors import MixchatError, UsageError
from mixchat.base.model_config import DEFAULT_TOKENS, MAX_DEFAULT_TOKENS, Context
from mixchat.base.options import ChatOptions, LoadOptions
from mixchat.base.progress import Reporter
from mixchat.serving.client.server_url import SERVER_IDENTITY
from mixchat.sessions.cache_file import CacheSaver
from mixchat.sessions.opening import find_or_build, open_service, open_session
from mixchat.sessions.provider import Predictor
from mixchat.weights.families.read_config import read_config_file

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.serving.requests.lines import Begin
    from mixchat.serving.web.served_models import ModelFacts
    from mixchat.text.form.output_constraint import OutputConstraint

_MAX_CONTEXT = Context(MAX_DEFAULT_TOKENS, MAX_DEFAULT_TOKENS, is_chosen=False)


class LocalModels:
    """The `ModelProvider` of models that are loaded here. `usual` is the one if none is named."""

    place = "on this machine"

    def __init__(
        self,
        load: LoadOptions,
        reporter: Reporter,
        *,
        usual: str,
        form: OutputConstraint | None = None,
        prompt_cache: Path | None = None,
        keep_cache: bool = False,
    ) -> None:
        self._load, self._reporter, self._usual, self._form = load, reporter, usual, form
        self._prompt_cache, self._keep_cache = prompt_cache, keep_cache
        self._facts: dict[str, tuple[tuple[int, int], ModelFacts]] = {}

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return a model. The usual one continues a server's chat whose model is unknown here."""
        from mixchat.weights.models import is_model

        if given is not None:
            return given
        if resumed is None or (resumed.identity == SERVER_IDENTITY and not is_model(resumed.model)):
            return self._usual
        return resumed.model

    def context_of(self, name: str) -> Context:
        """Return the largest context that a model may get, the usual one until it is installed.

        Raises `UsageError` for a size that the model cannot do.
        """
        from mixchat.weights.models import installed_directory

        try:
            config = read_config_file(installed_directory(name) / "config.json")
        except MixchatError:  # `open` raises it again, or builds the demo
            return _MAX_CONTEXT
        if self._load.context_size is None:
            return Context(config.default_contexts[-1], config.largest_context, is_chosen=False)
        return Context.of(config, self._load.context_size)

    def open(
        self, name: str, options: ChatOptions, resumed: SavedChat | None = None
    ) -> ChatSession:
        return open_session(
            name,
            self._load,
            options,
            self._reporter,
            form=self._form,
            resumed=resumed,
            cache=self._prompt_cache,
        )

    @contextmanager
    def lines(
        self, name: str, options: ChatOptions, parallel: int
    ) -> Iterator[tuple[Begin, Context]]:
        from mixchat.serving.requests.forms import forms_of
        from mixchat.serving.requests.lines import AHEAD, LineDefaults, answered_here
        from mixchat.serving.requests.options import LoadedModel
        from mixchat.text.form.output_constraint import PATIENT_S

        load = replace(self._load, exact_prompts=True, parallel=parallel)
        service, defaults = open_service(
            name, load, AHEAD * parallel, self._reporter, options.sampling
        )
        if options.max_tokens is not None:
            defaults = replace(defaults, max_tokens=options.max_tokens)
        seed = options.sampling["seed"]
        fields = {"stop": list(options.stop)} | ({} if seed is None else {"seed": seed})
        given = LineDefaults(fields, options.system)
        forms = forms_of(service, PATIENT_S)
        with closing(service):
            begin = answered_here(LoadedModel(service, defaults, forms), given)
            yield begin, self.context_of(name)

    def predictor(self, session: ChatSession, name: str) -> Predictor:
        from mixchat.loading.loader import speed_predictor
        from mixchat.weights.models import installed_directory

        return speed_predictor(installed_directory(name), self._load.device, session.engine)

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> CacheSaver:
        return CacheSaver(
            saver,
            self._reporter,
            named=self._prompt_cache,
            create=self._keep_cache,
            strict=asks_once,
        )

    def others(self, current: str) -> list[str]:
        from mixchat.weights.models import installed_directory, installed_names

        directory = _directory_of(current)
        return [name for name in installed_names() if installed_directory(name) != directory]

    def other_contexts(self, current: str) -> dict[str, Context]:
        """Return the least contexts of the other models, which programs can rely on.

        A model that cannot load has the usual one.
        """
        from mixchat.weights.models import installed_directory

        contexts = {}
        for name in self.others(current):
            contexts[name] = Context(DEFAULT_TOKENS, DEFAULT_TOKENS, is_chosen=False)
            with suppress(MixchatError):
                config = read_config_file(installed_directory(name) / "config.json")
                contexts[name] = Context.of(config, self._load.context_size)
        return contexts

    def facts(self, name: str) -> ModelFacts | None:
        """Return what is known of an installed model, None if its files are damaged or gone."""
        from mixchat.weights.format.manifest import MANIFEST_FILE
        from mixchat.weights.models import installed_directory

        try:
            directory = installed_directory(name)
            status = (directory / MANIFEST_FILE).stat()
            stamp = status.st_ino, status.st_mtime_ns
            known, facts = self._facts.get(name, (None, None))
            if facts is None or known != stamp:  # reading thousands of checksums takes long
                facts = _facts_of(directory, status.st_mtime)
                self._facts[name] = stamp, facts
            return facts
        except (MixchatError, OSError):
            return None

    def check(self, name: str, current: str) -> None:
        """Raise `MixchatError` if a chat cannot change. The demo is built for it."""
        from mixchat.text.checkpoint_text import CheckpointText
        from mixchat.weights.format.installed_model import InstalledModel

        if self._load.trace is not None:
            raise UsageError("the model cannot change: --trace records the routing of one model")
        directory = find_or_build(name, self._reporter)
        if directory == _directory_of(current):
            raise UsageError(f"this chat already has the model {name}")
        with (
            closing(CheckpointText(directory)) as text,
            self._reporter.status(f"checking {name}"),
            InstalledModel(directory) as installed,
        ):
            Context.of(installed.config, self._load.context_size)
            text.tokenizer()


def _facts_of(directory: Path, modified: float) -> ModelFacts:
    from mixchat.serving.web.served_models import ModelFacts
    from mixchat.weights.format.blueprint import Blueprint, Quantization
    from mixchat.weights.format.manifest import read_manifest

    manifest, config = read_manifest(directory), read_config_file(directory / "config.json")
    quantization = manifest.quant_type
    return ModelFacts(
        manifest.size,
        Blueprint(config, Quantization()).parameter_count,
        manifest.quantization["dtype"] if quantization == "none" else quantization,
        hashlib.sha256(manifest.serialized()).hexdigest(),
        modified,
        config.model_type,
    )


def _directory_of(name: str) -> Path | None:
    from mixchat.weights.models import installed_directory

    with suppress(MixchatError):
        return installed_directory(name)
    return None
