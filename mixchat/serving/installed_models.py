"""The installed models, as a server lists and swaps them."""

from __future__ import annotations

import hashlib
from contextlib import suppress

from mixchat.base.context import Context
from mixchat.base.errors import MixchatError
from mixchat.base.model_config import DEFAULT_TOKENS
from mixchat.install.models import installed_directory, other_models
from mixchat.serving.web.served_models import ModelFacts
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.manifest import MANIFEST_FILE, read_manifest


class InstalledModels:
    """The models that are installed. `context_size` is chosen for all of them, in tokens."""

    def __init__(self, context_size: int | None) -> None:
        self._context_size = context_size
        self._facts: dict[str, tuple[tuple[int, int], ModelFacts]] = {}

    def others(self, current: str) -> dict[str, Context]:
        """Return the least contexts of the other models, which programs can rely on.

        A model that cannot load has the usual one.
        """
        contexts = dict[str, Context]()
        for name, directory in other_models(current).items():
            contexts[name] = Context(DEFAULT_TOKENS, DEFAULT_TOKENS, is_chosen=False)
            with suppress(MixchatError):
                config = read_config_file(directory / "config.json")
                contexts[name] = Context.of(config, self._context_size)
        return contexts

    def facts(self, name: str) -> ModelFacts | None:
        """Return the facts of an installed model, None if its files are damaged or gone."""
        try:
            directory = installed_directory(name)
            status = (directory / MANIFEST_FILE).stat()
            stamp = status.st_ino, status.st_mtime_ns
            known, facts = self._facts.get(name, (None, None))
            if facts is None or known != stamp:  # reading thousands of checksums takes long
                manifest = read_manifest(directory)
                config = read_config_file(directory / "config.json")
                quant_type = manifest.quant_type
                facts = ModelFacts(
                    manifest.size,
                    Blueprint(config, Quantization()).parameter_count,
                    manifest.quantization["dtype"] if quant_type == "none" else quant_type,
                    hashlib.sha256(manifest.serialized()).hexdigest(),
                    status.st_mtime,
                    config.model_type,
                )
                self._facts[name] = stamp, facts
            return facts
        except (MixchatError, OSError):
            return None
