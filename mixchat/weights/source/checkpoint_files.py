"""The files of a checkpoint: safetensors and the small files beside them, no pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from mixchat.base.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
COMPANION_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")


def read_weight_map(
    names: Collection[str], index: bytes | None, *, where: str
) -> dict[str, str] | None:
    """Return the shard of each tensor, for a checkpoint with the files `names` at its top level.

    `index` is the content of `model.safetensors.index.json`. Only the shards that it names are
    read: copies (`consolidated.*`) and adapters beside them are ignored. None where there is no
    index: then all tensors are in `model.safetensors`. `where` names the checkpoint in messages.
    Raises `CheckpointError` where there is nothing that can be read.
    """
    if index is not None:
        weight_map = _parse(index, where)
        if missing := sorted(set(weight_map.values()) - set(names)):
            raise CheckpointError(
                f"{where}: {INDEX} names {missing[0]}, which is not there"
                + (f" ({len(missing)} files are missing)" if len(missing) > 1 else "")
            )
        return weight_map
    if SINGLE in names:
        return None
    if any(name.endswith(_PICKLES) for name in names):
        raise CheckpointError(
            f"{where}: there are only pickled weights, which mixchat never opens",
            hint="A pickle can run any program when it is read. Use a checkpoint in safetensors.",
        )
    raise CheckpointError(
        f"{where}: there are no weights (neither {INDEX} nor {SINGLE})",
        hint="mixchat reads checkpoints in Hugging Face's layout.",
    )


def shard_files(weight_map: dict[str, str] | None) -> list[str]:
    """Return the names of the files with weights."""
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _parse(index: bytes, where: str) -> dict[str, str]:
    """Return the index's map from tensor to file. Raises unless each is a shard's plain name."""
    try:
        weight_map = dict(json.loads(index)["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where}: {INDEX} cannot be read") from None
    for shard in weight_map.values():
        if (
            not isinstance(shard, str)
            or not _PLAIN_NAME.fullmatch(shard)
            or not shard.endswith(".safetensors")
            or shard.startswith("consolidated")
        ):
            raise CheckpointError(f"{where}: {INDEX} names a file that is no shard: {shard!r:.80}")
    if not weight_map:
        raise CheckpointError(f"{where}: {INDEX} names no files")
    return weight_map
