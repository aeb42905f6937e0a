"""A checkpoint in GGUF: its files among others, and its config, tokenizer and tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Event

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.files import write_file
from mixchat.base.progress import Task
from mixchat.base.safetensors import SafetensorsFile
from mixchat.install.source.checkpoint import Checkpoint, fingerprint_of, remove_files
from mixchat.install.source.checkpoint_index import CONFIG, CheckpointIndex
from mixchat.install.source.gguf_file import GgufFile, GgufHeader
from mixchat.install.source.gguf_text import generation_config, text_files
from mixchat.weights.families.gguf_config import gguf_config
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix.gguf_format import GgufSpec

SUFFIX = ".gguf"
# llama-gguf-split splits a model into NAME-00001-of-00003.gguf and so on.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
# Names end with the type of most weights. UD are Unsloth's mixes.
_KIND = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE
)
# Words in the names of other files beside models: projectors of images, and importances of weights.
_OTHER_MODELS = ("mmproj", "imatrix")


class GgufCheckpoint(Checkpoint):
    """The files of a model in GGUF on this disk. Its small files are made in `directory`.

    Raises `CheckpointError` if it is not complete.
    """

    def __init__(self, files: Mapping[str, Path], source: Source, directory: Path) -> None:
        self.source = source
        self._files = files
        self._directory = directory
        headers = {}
        for name, path in files.items():
            with GgufFile(path) as file:
                headers[name] = file.header
        self.index, self._made = read_gguf(headers, source.repo)
        self.size = self.index.size
        self.fingerprint = source.commit or fingerprint_of(files)

    def companions(self) -> Path:
        write_made(self._directory, self._made)
        return self._directory

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        return self._files[shard]

    def open(self, shard: str) -> SafetensorsFile:
        return self.index.open(shard, self._files[shard])

    def close(self) -> None:
        remove_files(self._directory, self._made)


def read_gguf(
    headers: Mapping[str, GgufHeader], where: str
) -> tuple[CheckpointIndex, dict[str, bytes]]:
    """Return the index of a model in GGUF, and its small files as of a Hugging Face checkpoint.

    `headers` are by the names of its files, and `where` names it in messages. Raises
    `CheckpointError`.
    """
    metadata = headers[min(headers)].metadata
    specs = [spec for header in headers.values() for spec in header.specs]
    shapes = {s.name: s.weights if isinstance(s, GgufSpec) else s.shape for s in specs}
    if len(shapes) < len(specs):
        raise CheckpointError(f"{where}: two of its files have the same tensor")
    generation = generation_config(metadata)
    ends = {"eos_token_id": generation["eos_token_id"]}
    raw = {**gguf_config(metadata, shapes, where), **ends}
    index = CheckpointIndex(read_config(raw), headers, None, where)
    files = text_files(
        metadata, index.config.max_position_embeddings, index.config.vocab_size, where
    )
    documents = {CONFIG: raw, "generation_config.json": generation}
    written = {
        name: (json.dumps(document, indent=2) + "\n").encode()
        for name, document in documents.items()
    }
    return index, {**files, **written}


def choose_files(names: Collection[str], quantization: str | None, where: str) -> dict[str, str]:
    """Return the files of one model among `names`, which can have folders, by name without folder.

    quantization: the end of a file's name ("Q4_K_M"), or all of it. None chooses the only model.
    Raises `UsageError`, which lists the quantizations that there are.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        stem = name.rpartition("/")[2].removesuffix(SUFFIX)
        if name.endswith(SUFFIX) and not any(word in stem.lower() for word in _OTHER_MODELS):
            numbered = _PART.fullmatch(stem)
            models.setdefault(numbered[1] if numbered else stem, []).append(name)
    wanted = (quantization or "").lower().removesuffix(SUFFIX)
    matches = [m for m in models if not quantization or wanted in (m.lower(), kind_of(m).lower())]
    if len(matches) != 1:
        choices = matches or [*models]
        types = [kind_of(model) for model in choices]
        shown = types if len({*types}) == len(types) else choices
        problem = f"has no {quantization}" if quantization else "has several models"
        hint = None
        if shown:
            example = f"{where.partition(':')[0]}:{shown[0]}"
            hint = f"Choose one of {', '.join(shown[:40])}, as in {example}."
        raise UsageError(f"{where} {problem} in GGUF", hint=hint)
    _check_parts(models[matches[0]], where)
    return {name.rpartition("/")[2]: name for name in models[matches[0]]}


def local_files(path: Path) -> dict[str, Path]:
    """Return a GGUF file with the other parts of its model, by name. Raises `CheckpointError`."""
    numbered = _PART.fullmatch(path.stem)
    if numbered is None:
        return {path.name: path}
    names = [file.name for file in path.parent.glob(f"*-of-{numbered[3]}{SUFFIX}")]
    names = [name for name in names if name.startswith(f"{numbered[1]}-") and _PART.match(name)]
    _check_parts(sorted(names), str(path))
    return {name: path.parent / name for name in sorted(names)}


def kind_of(model: str) -> str:
    """Return the type of weights that ends a model's name ("Q4_K_M"), else the name."""
    match = _KIND.search(model)
    return match[1] if match else model


def write_made(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files that were made of metadata."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_file(directory / name, data)


def _check_parts(names: list[str], where: str) -> None:
    """Raise `CheckpointError` unless all parts of a model are there."""
    matches = [_PART.fullmatch(name.rpartition("/")[2].removesuffix(SUFFIX)) for name in names]
    numbers = [int(match[2]) for match in matches if match]
    count = int(matches[0][3]) if matches and matches[0] else len(names)
    if (numbers or [1]) != [*range(1, count + 1)]:
        raise CheckpointError(f"{where}: {len(names)} of the {count} parts of its GGUF are there")
