"""Opens a chat session or a service from a model's name: all that takes long starts here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mixchat.base.errors import MixchatError, ModelNotFoundError
from mixchat.base.model_config import (
    DEFAULT_TOKENS,
    Context,
    ModelConfig,
    advised_length,
    advised_sampling,
)
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.chat.parameters import with_numbers
from mixchat.cli.output.print_answer import OutputOptions
from mixchat.cli.output.show_progress import show_progress, status
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.chat.backend import Overflow
    from mixchat.chat.session import ChatSession
    from mixchat.serving.model_service import ModelService
    from mixchat.serving.requests.options import Defaults
    from mixchat.text.form.constraint import CompiledConstraint
    from mixchat.text.form.output_constraint import OutputConstraint
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer


def context_of(model: str, size: int | None) -> Context:
    """Return the context that a model will have; the default one while it is not installed.

    Raises `UsageError` for a size that the model cannot do.
    """
    from mixchat.weights import models

    try:
        config = ModelConfig.from_file(models.installed_directory(model) / "config.json")
    except MixchatError:  # open_session raises it again, or builds the demo
        return Context(DEFAULT_TOKENS, DEFAULT_TOKENS)
    return Context.of(config, size)


def resolve_sampling(
    given: Mapping[str, float | None], advised: Mapping[str, float]
) -> SamplingOptions:
    """Return what flags give, else what the model's makers advise, else the defaults.

    None stands for a flag that was not given. Advice beyond the limits of the flags is ignored.
    The seed is drawn here, so that it can be shown and repeated.
    """
    import secrets

    defaults = SamplingOptions(seed=secrets.randbelow(2**32))
    return with_numbers(with_numbers(defaults, advised), given)


def open_session(
    model: str,
    load: LoadOptions,
    output: OutputOptions,
    *,
    sampling: Mapping[str, float | None],
    system: str | None,
    max_tokens: int | None,
    stop: Sequence[str],
    overflow: Overflow,
    form: OutputConstraint | None = None,
) -> ChatSession:
    """Find the model, load it, and return a session with it; its answers have the given form."""
    with _texts(model, output) as (directory, tokenizer, template):
        from mixchat.chat.engine_backend import EngineBackend
        from mixchat.chat.session import ChatSession
        from mixchat.loading.loader import load_engine

        compiled = None if form is None else _compiled(form, tokenizer, template)
        backend = EngineBackend(
            load_engine(directory, load, output.note),
            tokenizer,
            template,
            advised_tokens=advised_length(directory),
            form=compiled,
        )
        return ChatSession(
            backend,
            system=system,
            sampling=resolve_sampling(sampling, advised_sampling(directory)),
            max_tokens=max_tokens,
            stop=stop,
            overflow=overflow,
        )


@contextmanager
def _texts(model: str, output: OutputOptions) -> Iterator[tuple[Path, Tokenizer, Template]]:
    """Yield a model's directory, tokenizer and template, while a line says that it is loading."""
    from mixchat.text.checkpoint_text import CheckpointText

    directory = find_or_build(model, quiet=output.quiet)
    text = CheckpointText(directory)  # first: it loads in a thread while torch is imported
    prepare_environment()
    with nullcontext() if output.quiet else status(f"loading {model}"):
        from mixchat.weights.format.manifest import read_manifest
        from mixchat.weights.format.model_files import check_files

        check_files(directory, read_manifest(directory))  # its hint names `repair`, if need be
        config = ModelConfig.from_file(directory / "config.json")
        yield directory, text.tokenizer(), text.template(config.eos_token_ids)


def _compiled(
    form: OutputConstraint, tokenizer: Tokenizer, template: Template
) -> CompiledConstraint:
    from mixchat.text.form.constraint import ConstraintCompiler

    return ConstraintCompiler(tokenizer, template.stop_ids).compile(form)


def open_service(
    model: str,
    load: LoadOptions,
    queue: int,
    output: OutputOptions,
    sampling: Mapping[str, float | None] = MappingProxyType({}),
    *,
    shared_prefix: bool = True,
) -> tuple[ModelService, Defaults]:
    """Find the model, load it, and return a service with it, and its defaults.

    `queue`: how many jobs may wait beside the `load.parallel` that are answered at once. The
    defaults are `sampling`, and what the model's makers advise.
    """
    with _texts(model, output) as (directory, tokenizer, template):
        from mixchat.loading.loader import load_engine
        from mixchat.serving.model_service import ModelService
        from mixchat.serving.requests.options import Defaults

        service = ModelService(
            model,
            lambda: load_engine(directory, load, output.note),
            tokenizer,
            template,
            queue=queue,
            shared_prefix=shared_prefix,
        )
    chosen = resolve_sampling(sampling, advised_sampling(directory))
    return service, Defaults(chosen, advised_length(directory))


def find_or_build(name: str, *, quiet: bool = False) -> Path:
    """Return the directory of an installed model; the demo is built first where it is missing."""
    from mixchat.weights import models

    try:
        return models.installed_directory(name)
    except ModelNotFoundError:
        if not models.resolve(name).demo:
            raise
    prepare_environment()
    from mixchat.base.progress import NoProgress
    from mixchat.weights.make.download import DownloadRequest, download
    from mixchat.weights.make.quantize_options import QuantizeOptions

    bars = nullcontext(NoProgress()) if quiet else show_progress()
    with bars as progress:
        return download(DownloadRequest(models.resolve(name), QuantizeOptions()), progress)
