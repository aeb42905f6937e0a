"""Loads a model for a chat or for a service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mixchat.base.errors import ModelNotFoundError, PromptError
from mixchat.base.model_config import DEFAULT_TOKENS, advised_length, advised_sampling
from mixchat.base.options import ChatOptions, LoadOptions, SamplingOptions
from mixchat.base.progress import Reporter
from mixchat.chat.parameters import with_numbers
from mixchat.engine.environment import prepare_environment
from mixchat.sessions.cache_file import ServerCaches

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.session import ChatSession
    from mixchat.engine.generate import Engine
    from mixchat.serving.model_service import ModelService
    from mixchat.serving.requests.options import Defaults
    from mixchat.text.form.output_constraint import OutputConstraint
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer
    from mixchat.weights.format.installed_model import InstalledModel


@dataclass(frozen=True)
class OpenedModel:
    """An installed model's files and its makers' advice, before its engine is built."""

    files: InstalledModel
    tokenizer: Tokenizer
    template: Template
    sampling: Mapping[str, float]
    max_tokens: int | None


def resolve_sampling(
    given: Mapping[str, float | None], advised: Mapping[str, float]
) -> SamplingOptions:
    """Return the values of flags, else the advice of the model's makers, else the defaults.

    The seed is drawn here, so that it can be shown.
    """
    import secrets

    defaults = SamplingOptions(seed=secrets.randbelow(2**32))
    return with_numbers(with_numbers(defaults, advised), given)


def open_session(
    name: str,
    load: LoadOptions,
    options: ChatOptions,
    reporter: Reporter,
    form: OutputConstraint | None = None,
    resumed: SavedChat | None = None,
    cache: Path | None = None,
) -> ChatSession:
    """Return a session with a model.

    Its context has room for the `resumed` chat and for the KV cache in the file `cache`, unless a
    person chose another size or memory is too short.
    """
    with _opened(name, reporter) as model:
        load = replace(load, least_context=_tokens_to_hold(model, options, resumed, cache))
        from mixchat.chat.engine_backend import EngineBackend
        from mixchat.chat.session import ChatSession
        from mixchat.loading.loader import build_engine
        from mixchat.text.form.constraint import ConstraintCompiler

        compiled = None
        if form is not None:
            compiled = ConstraintCompiler(model.tokenizer, model.template.stop_ids).compile(form)
        backend = EngineBackend(
            build_engine(model.files, load, reporter.note),
            model.tokenizer,
            model.template,
            advised_tokens=model.max_tokens,
            form=compiled,
        )
        return ChatSession(backend, resolve_sampling(options.sampling, model.sampling), options)


def _tokens_to_hold(
    model: OpenedModel, options: ChatOptions, resumed: SavedChat | None, cache: Path | None
) -> int:
    """Return the tokens of a chat or of its KV cache, and of one more answer, 0 without any.

    A chat that leaves out old turns fits into every context. Its KV cache need not.
    """
    from mixchat.engine.prompt_cache import saved_tokens

    tokens = 0
    if cache is not None:
        tokens = saved_tokens(cache)
    if resumed is not None:
        from mixchat.chat.saved.chat_store import ChatStore

        tokens = max(tokens, saved_tokens(ChatStore().kv_path(resumed.id)))
        if options.overflow == "stop" and resumed.messages:
            with suppress(PromptError):
                tokens = max(tokens, len(model.template.encode(resumed.messages)))
    return tokens and tokens + DEFAULT_TOKENS // 4


def open_service(
    name: str,
    load: LoadOptions,
    queue: int,
    reporter: Reporter,
    sampling: Mapping[str, float | None] = MappingProxyType({}),
    *,
    shared_prefix: bool = True,
    keep_caches: bool = False,
) -> tuple[ModelService, Defaults]:
    """Return a service with a model, and the defaults of its answers.

    `queue` jobs may wait while `load.parallel` others are answered. If `keep_caches`, its KV caches
    lie in files while it is not loaded.
    """
    with _opened(name, reporter) as model:
        from mixchat.loading.loader import build_engine
        from mixchat.serving.model_service import ModelService
        from mixchat.serving.requests.options import Defaults

        key = model.files.directory.name
        caches = ServerCaches(key, reporter.note) if keep_caches else None

        def build() -> Engine:
            engine = build_engine(model.files, load, reporter.note)
            if caches is not None:
                caches.load(engine)
            return engine

        def close(engine: Engine) -> None:
            try:
                if caches is not None:
                    caches.save(engine)
            finally:
                engine.close()

        service = ModelService(
            name,
            build,
            model.tokenizer,
            model.template,
            queue=queue,
            close=close,
            shared_prefix=shared_prefix,
        )
    return service, Defaults(resolve_sampling(sampling, model.sampling), model.max_tokens)


def find_or_build(name: str, reporter: Reporter) -> Path:
    """Return the directory of an installed model. A missing demo is built first."""
    from mixchat.weights import models

    try:
        return models.installed_directory(name)
    except ModelNotFoundError:
        if not (ref := models.resolve(name)).demo:
            raise
    prepare_environment()
    from mixchat.weights.make.download import DownloadRequest, download
    from mixchat.weights.make.quantize_options import QuantizeOptions

    with reporter.progress() as progress:
        return download(DownloadRequest(ref, QuantizeOptions()), progress)


@contextmanager
def _opened(name: str, reporter: Reporter) -> Iterator[OpenedModel]:
    """Yield an open model, and show that it is loading meanwhile."""
    from mixchat.text.checkpoint_text import CheckpointText

    directory = find_or_build(name, reporter)
    text = CheckpointText(directory)  # it loads in a thread while torch is imported
    prepare_environment()
    with reporter.status(f"loading {name}"):
        from mixchat.weights.format.installed_model import InstalledModel

        files = InstalledModel(directory)  # its hint names `repair`, if need be
        try:
            yield OpenedModel(
                files,
                text.tokenizer(),
                text.template(files.config.eos_token_ids),
                advised_sampling(directory),
                advised_length(directory),
            )
        except BaseException:
            files.close()
            raise
