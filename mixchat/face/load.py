"""Loads an installed model, with its text and its makers' advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import ModelNotFoundError, UsageError, short_repr, unknown_argument
from mixchat.base.model_config import advised_length, advised_sampling
from mixchat.base.option import documented, options_of
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import QuietReporter, Reporter
from mixchat.base.quantities import format_size
from mixchat.base.settings import models_dir, report_path_by_key
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.face.model import Model
    from mixchat.text.template import Template

# Advice for names that other programs use.
_CONTEXT_NAMES = ("n_ctx", "num_ctx", "ctx_size", "max_model_len", "max_seq_len")
_ADVICE = dict.fromkeys(_CONTEXT_NAMES, "write context_size")


@documented(LoadOptions)
def load(name: str, **options: Any) -> Model:
    """Load an installed model, by its name or its directory. Close it to give its memory back.

    A missing "demo" is built first. With `parallel` above 1 prompts are exact by default. Options:

    {options}

    Raises `ModelNotFoundError` if it is not installed, `ResourceError` without enough memory,
    `CheckpointError` if its files are damaged, and `UsageError` for an option that cannot be used.
    """
    if isinstance(name, Path):
        name = str(name)
    if not isinstance(name, str):
        raise UsageError(f"a model's name has to be a text, not {short_repr(name)}")
    return open_model(name, checked_load_options(options), QuietReporter())


def checked_load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Return the options of `mixchat.load`. None counts as not given. Raises `UsageError`."""
    declared = options_of(LoadOptions)
    for name in options:
        if name not in declared:
            raise unknown_argument(name, declared, _ADVICE)
    chosen = {
        name: declared[name].checked(value, name)
        for name, value in options.items()
        if value is not None
    }
    chosen.setdefault("exact_prompts", chosen.get("parallel", 1) > 1)
    return LoadOptions(**chosen)


def open_model(
    name: str,
    options: LoadOptions,
    reporter: Reporter,
    *,
    least_context: Callable[[Template], int] = lambda template: 0,
    keep_caches: bool = False,
    shown: bool = True,
    **model_options: Any,
) -> Model:
    """Load a model. A missing demo is built first.

    least_context: returns the tokens for which the context has room if memory allows. keep_caches:
    keep the KV caches in files while the model is not loaded. shown: show that it is loading.
    model_options: of `Model`.
    """
    from mixchat.text.checkpoint_text import CheckpointText

    directory = find_or_build(name, reporter)
    text = CheckpointText(directory)  # it loads in a thread while torch is imported
    prepare_environment()
    status = reporter.status(f"loading {name}") if shown else nullcontext()
    with status, ExitStack() as opened:
        from mixchat.engine.report import report_of, save_report
        from mixchat.face.kept_caches import KeptCaches
        from mixchat.face.model import Model, ModelText
        from mixchat.loading.loader import build_engine
        from mixchat.weights.format.installed_model import InstalledModel

        files = InstalledModel(directory)  # its hint names `repair`, if need be
        opened.callback(files.close)
        tokenizer = text.tokenizer()
        template = text.template(files.config.eos_token_ids)
        options = replace(options, least_context=least_context(template) or options.least_context)
        caches = KeptCaches(directory.name, reporter.note) if keep_caches else None

        def build() -> Engine:
            engine = build_engine(files, options, reporter.note)
            if caches is not None:
                caches.load(engine)
            return engine

        def close(engine: Engine) -> None:
            try:
                if engine.passes.total_tokens and directory.parent == models_dir():
                    with suppress(OSError):  # it dates the model's last use
                        path = report_path_by_key(directory.name)
                        save_report(path, report_of(engine, name))
                if caches is not None:
                    caches.save(engine)
            finally:
                engine.close()
                files.close()  # whoever keeps a closed model keeps none of its files

        sampling = SamplingOptions(**advised_sampling(directory))
        own_text = ModelText(tokenizer, template, sampling, advised_length(directory))
        model = Model(name, build, own_text, close=close, **model_options)
        opened.pop_all()  # the engine reads the files
        return model


def check_model(directory: Path, options: LoadOptions) -> None:
    """Raise `MixchatError` if an installed model cannot be loaded, whatever memory is free."""
    from mixchat.base.context import Context
    from mixchat.text.checkpoint_text import CheckpointText
    from mixchat.weights.format.installed_model import InstalledModel

    with closing(CheckpointText(directory)) as text, InstalledModel(directory) as installed:
        Context.of(installed.config, options.context_size)
        text.template()


def find_or_build(name: str, reporter: Reporter) -> Path:
    """Return the directory of an installed model. A missing demo is built first."""
    from mixchat.install import models

    try:
        return models.installed_directory(name)
    except ModelNotFoundError:
        if not (ref := models.resolve(name)).demo:
            raise
    prepare_environment()
    from mixchat.install.make.download import DownloadRequest, download
    from mixchat.install.make.quantize_options import QuantizeOptions

    with reporter.progress() as progress:
        return download(DownloadRequest(ref, QuantizeOptions()), progress)


@contextmanager
def recommending(is_named: bool) -> Iterator[None]:
    """Let the error of a missing model name one for this machine, if a person named none.

    It does so only if no model is here yet.
    """
    from mixchat.install.models import TO_TRY, names_here

    try:
        yield
        return
    except ModelNotFoundError:
        if is_named or names_here():
            raise
    prepare_environment()
    from mixchat.install.known_models import KNOWN
    from mixchat.loading.plan import recommend

    hint = f"'mixchat plan' compares all that it knows, and {TO_TRY}."
    if (best := recommend()) is not None:
        name, plan = best
        size = format_size(plan.fit.blueprint.weights_size)
        download = f"{KNOWN[name].fetched_gb} GB, then {size} of disk"
        hint = f"To get the one for this machine: mixchat download {name} ({download}). {hint}"
    raise ModelNotFoundError("no model is on this machine yet", hint=hint)
