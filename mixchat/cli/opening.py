"""From a model's name and flags to a session that can be asked: all that is heavy begins here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixchat.cli.flags.model_flags import Sampling
from mixchat.cli.output.failure import note
from mixchat.cli.output.show_progress import show_progress, status
from mixchat.context import DEFAULT_TOKENS, Context
from mixchat.engine.environment import prepare_environment
from mixchat.errors import MixchatError, ModelNotFoundError
from mixchat.model_config import ModelConfig, advised_length, advised_sampling
from mixchat.quantities import MemoryBudget

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession, Overflow
    from mixchat.text.checkpoint_text import CheckpointText


@dataclass(frozen=True)
class Opening:
    """What `mixchat run` was asked for."""

    model: str
    system: str | None
    sampling: Sampling
    max_tokens: int | None
    stop: Sequence[str]
    context_size: int | None
    overflow: Overflow
    kv_bits: Literal[8, 16] | None
    exact_prompts: bool
    host_memory: MemoryBudget | None
    device_memory: MemoryBudget | None
    device: str | None
    cache_policy: str
    trace: Path | None
    quiet: bool = False

    def context(self) -> Context:
        """The context, before anything is loaded; a model's that is not there yet is the default's.

        Raises `UsageError` for a size that the model cannot do.
        """
        from mixchat.weights import models

        try:
            config = ModelConfig.from_file(models.find(self.model) / "config.json")
        except MixchatError:  # open() says what is wrong, or builds the demo
            return Context(DEFAULT_TOKENS, DEFAULT_TOKENS)
        return Context.of(config, self.context_size)

    def open(self) -> ChatSession:
        """Find the model, load it, and begin a session."""
        from mixchat.text.checkpoint_text import CheckpointText

        directory = find_or_build(self.model)
        text = CheckpointText(directory)  # first, so that it loads while torch is imported
        prepare_environment()
        with nullcontext() if self.quiet else status(f"loading {self.model}"):
            return self._load(directory, text)

    def _load(self, directory: Path, text: CheckpointText) -> ChatSession:
        from mixchat.chat.session import ChatSession
        from mixchat.loading.loader import LoadOptions, load_engine
        from mixchat.weights.format.manifest import check_files, read_manifest

        check_files(directory, read_manifest(directory))  # which says `repair`, if need be
        tokenizer = text.tokenizer()
        options = LoadOptions(
            host_memory=self.host_memory,
            device_memory=self.device_memory,
            context_size=self.context_size,
            kv_bits=self.kv_bits,
            exact_prompts=self.exact_prompts,
            device=self.device,
            cache_policy=self.cache_policy,
            trace=self.trace,
            note=_nothing if self.quiet else note,
        )
        engine = load_engine(directory, options)
        return ChatSession(
            engine,
            tokenizer,
            text.template(engine.config.eos_token_ids),
            system=self.system,
            sampling=self.sampling.options(advised_sampling(directory)),
            max_tokens=self.max_tokens,
            advised_tokens=advised_length(directory),
            stop=self.stop,
            overflow=self.overflow,
        )


def find_or_build(name: str) -> Path:
    """Where the model is kept. Only the demo model is built if it is missing."""
    from mixchat.weights import models

    try:
        return models.find(name)
    except ModelNotFoundError:
        ref = models.resolve(name)
        if not ref.demo:
            raise
    prepare_environment()
    from mixchat.weights.make.download import DownloadRequest, download
    from mixchat.weights.make.quantize import QuantizeOptions

    with show_progress() as progress:
        return download(DownloadRequest(ref, QuantizeOptions()), progress)


def _nothing(text: str) -> None:
    """Where nobody wants to hear of it."""
