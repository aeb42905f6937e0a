"""A file for the caches of a sequence between two runs, so that no text is prefilled twice.

It is a safetensors file with these tensors, in this order:

    mixchat_prompt_cache   JSON: {"format": 3, "model": "...", "cache": "pages of 16 bits",
                           "tokens": 700, "exact": false, "rope": [], "first": 0,
                           "checkpoints": []}. "exact" is true after --exact-prompts, "rope"
                           [16384] if the keys depend on the size of the context, "first" 2560 if
                           layers with a window have no older tokens, "checkpoints" [512] if layers
                           with a state can be cut to 512 tokens
    ids                    the tokens that the caches hold
    0.keys, 0.values, ...  the content of each layer's cache
    sha256                 of all bytes before it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_private_file, write_all, write_error
from mixchat.base.safetensors import SafetensorsFile, TensorSpec, header_bytes, tensor_bytes
from mixchat.engine.caches.checkpoints import TURN_ENDS
from mixchat.engine.caches.layer_cache import Extent
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.generate import Engine
from mixchat.kernels.cpu.pages import PAGE
from mixchat.weights.format.manifest import Manifest

_FORMAT = 3
_DESCRIPTION = "mixchat_prompt_cache"
_IDS = "ids"
_DIGEST = "sha256"
_MAX_DESCRIPTION_BYTES = 4096
# In a file, which has the state of each.
_MAX_CHECKPOINTS = TURN_ENDS


def identity_of(manifest: Manifest) -> str:
    """Return a hash that differs if a model's weights or its config do."""
    weights = {name: record.sha256 for name, record in manifest.weights.items()}
    config = manifest.files.get("config.json")
    hashes = [weights, config.sha256 if config else None]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


class PromptCache:
    """The caches of a sequence in the file `path`. A link there is replaced, not read.

    `number` is the sequence's in `Engine.sequences`.
    """

    def __init__(self, path: Path, engine: Engine, number: int = 0) -> None:
        self.path = path
        self._engine = engine
        self._number = number
        self._saved: list[int] = []  # the ids in the file
        self._extent = Extent()  # of the content in the file

    def load(self) -> int:
        """Load the file into an engine that holds nothing. Return how many tokens it holds then.

        A conversation that is longer than the context is cut, or not loaded if layers with a window
        lack tokens of the beginning. Raises `CheckpointError` if the file is damaged, or of another
        model or kind of cache. The engine then holds nothing.
        """
        _, cache = self._engine.held(self._number)
        try:
            with SafetensorsFile(self.path, follow=False) as file:
                saved, extent, length = _read(file, cache, self._engine)
        except BaseException:
            cache.clear()
            raise
        self._saved = saved
        self._extent = extent
        self._engine.resume(saved[:length], self._number)
        return length

    def save(self) -> bool:
        """Write the file, whole or not at all. Return False if it is up to date.

        Raises `ResourceError` if the disk is full, else another `MixchatError`.
        """
        ids, cache = self._engine.held(self._number)
        if ids == self._saved[: len(ids)] and cache.usable(len(ids), self._extent) == len(ids):
            return False
        try:
            extent = _write(self.path, cache, ids, self._engine)
        except OSError as error:
            raise write_error(error, self.path, "the prompt cache cannot be written") from None
        self._saved = ids
        self._extent = extent
        return True


def saved_tokens(path: Path) -> int:
    """Return how many tokens a file has, 0 if it is missing or damaged."""
    with suppress(CheckpointError, OSError), SafetensorsFile(path, follow=False) as file:
        if _IDS in file.header:
            return file.header.spec(_IDS).nbytes // torch.int64.itemsize
    return 0


def _stretched_for(cache: SequenceCache) -> list[int]:
    """Return the lengths that the keys' frequencies are stretched for."""
    lengths = (rope.stretched_for(cache.capacity) for rope in cache.config.ropes)
    return [length for length in lengths if length is not None]


def _specs(cache: SequenceCache, extent: Extent, description: int) -> list[TensorSpec]:
    return [
        TensorSpec(_DESCRIPTION, torch.uint8, (description,)),
        TensorSpec(_IDS, torch.int64, (extent.tokens,)),
        *(
            TensorSpec(f"{number}.{spec.name}", spec.dtype, spec.shape)
            for number, layer in enumerate(cache.layers)
            for spec in layer.specs(extent)
        ),
        TensorSpec(_DIGEST, torch.uint8, (hashlib.sha256().digest_size,)),
    ]


def _write(path: Path, cache: SequenceCache, ids: Sequence[int], engine: Engine) -> Extent:
    """Write the file. Return the extent of its content."""
    extent = cache.extent_to_save(_MAX_CHECKPOINTS)
    fields = {
        "format": _FORMAT,
        "model": engine.identity,
        "cache": cache.form,
        "exact": engine.exact_prompts,
        "rope": _stretched_for(cache),
        "tokens": extent.tokens,
        "first": extent.first,
        "checkpoints": extent.checkpoints,
    }
    description = json.dumps(fields).encode()
    digest = hashlib.sha256()
    with open_private_file(path) as descriptor:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            write_all(descriptor, data)

        put(header_bytes(_specs(cache, extent, len(description))))
        put(description)
        put(tensor_bytes(torch.tensor(ids, dtype=torch.int64)))
        for layer in cache.layers:
            # A copy of one layer at a time, since all are gigabytes.
            content = layer.content(extent)
            for spec in layer.specs(extent):
                put(tensor_bytes(content[spec.name]))
        put(digest.digest())
    return extent


def _read(
    file: SafetensorsFile, cache: SequenceCache, engine: Engine
) -> tuple[list[int], Extent, int]:
    """Load what fits into the cache.

    Return the ids of all tokens in the file, their extent, and the count of those that are loaded.
    """
    extent = _check_description(file, cache, engine)
    length = cache.usable(min(extent.tokens, cache.capacity), extent)
    # The digest is of all bytes before it: the header, the description, then each tensor.
    start = file.header.start(_DESCRIPTION)
    head = torch.empty(start + file.header.spec(_DESCRIPTION).nbytes, dtype=torch.uint8)
    file.read_into(head, 0)
    digest = hashlib.sha256(tensor_bytes(head))

    def take(name: str) -> torch.Tensor:
        tensor = file.read(name)
        digest.update(tensor_bytes(tensor))
        return tensor

    ids: list[int] = take(_IDS).tolist()
    for number, layer in enumerate(cache.layers):
        content = {spec.name: take(f"{number}.{spec.name}") for spec in layer.specs(extent)}
        if length:
            layer.restore(content, extent, length)
    # Only now, since a file of gigabytes is read once. The caller clears a damaged cache.
    if bytes(tensor_bytes(file.read(_DIGEST))) != digest.digest():
        raise CheckpointError(f"{file.path} is damaged (its SHA-256 differs)")
    cache.set_extent(extent.until(length))
    return ids, extent, length


def _check_description(file: SafetensorsFile, cache: SequenceCache, engine: Engine) -> Extent:
    """Return the extent of the file's content.

    Raises `CheckpointError` for a wrong header.
    """
    fields: Any = None
    header = file.header
    # A description of gigabytes is not read.
    if _DESCRIPTION in header and header.spec(_DESCRIPTION).nbytes <= _MAX_DESCRIPTION_BYTES:
        with suppress(ValueError, RecursionError):
            fields = json.loads(bytes(tensor_bytes(file.read(_DESCRIPTION))))
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file.path} is damaged (its description is missing)")
    if fields.get("format") != _FORMAT:
        raise CheckpointError(f"{file.path} was written by another version of mixchat")
    if fields.get("model") != engine.identity:
        raise CheckpointError(f"{file.path} was written for another model")
    if fields.get("cache") != cache.form:
        raise CheckpointError(
            f"{file.path} was written for another kind of cache, not {cache.form}"
        )
    if fields.get("exact") != engine.exact_prompts:
        written = "not written" if engine.exact_prompts else "written"
        raise CheckpointError(f"{file.path} was {written} with --exact-prompts")
    if fields.get("rope") != _stretched_for(cache):
        raise CheckpointError(f"{file.path} was written with another --ctx-size")
    extent = _extent(file, fields)
    if not cache.usable(extent.tokens, extent):
        raise CheckpointError(f"{file.path} is damaged (its first token is wrong)")
    # All sizes follow from the description, so nothing larger is read.
    if header.specs != _specs(cache, extent, header.spec(_DESCRIPTION).nbytes):
        raise CheckpointError(f"{file.path} is damaged (its tensors do not match its description)")
    return extent


def _extent(file: SafetensorsFile, fields: dict[str, Any]) -> Extent:
    """Return the extent in a description. Raises `CheckpointError` for wrong numbers."""
    tokens = fields.get("tokens")
    first = fields.get("first")
    if type(tokens) is not int or not 0 < tokens < 2**31:
        raise CheckpointError(f"{file.path} is damaged (its count of tokens is wrong)")
    if type(first) is not int or not 0 <= first < tokens or first % PAGE:
        raise CheckpointError(f"{file.path} is damaged (its first token is wrong)")
    checkpoints: Any = fields.get("checkpoints")
    if (
        not isinstance(checkpoints, list)
        or len(checkpoints) > _MAX_CHECKPOINTS
        or any(type(length) is not int for length in checkpoints)
        or not all(one < other for one, other in pairwise([0, *checkpoints, tokens]))
    ):
        raise CheckpointError(f"{file.path} is damaged (its checkpoints are wrong)")
    return Extent(tokens, first, tuple(checkpoints))
