"""The manifest of an installed model, `mixchat.json`, written last: it marks a finished model.

{"format": 3,
 "source": {"repo": "mistralai/Mixtral-8x7B-Instruct-v0.1", "commit": "...", "revision": null},
 "quantization": {"quant_type": "nf4", "blocksize": 64, "scales": "search", "layout": "cpu-packed",
                  "attention": "int8", "head": "int8", "dtype": "bfloat16"},
 "files": {"config.json": {"size": 123, "sha256": "..."}, ...},
 "weights": {"shared.safetensors": {"size": 456, "sha256": {"model.norm.weight": "...", ...}}, ...},
 "sha256": "..."}

Weights have a SHA-256 for each tensor, so that a damaged one can be named and rebuilt alone. The
last SHA-256 is the manifest's own, of all other keys (`_digest`). The same bytes are stored once
more as `mixchat.copy.json`, because nothing else could restore a damaged manifest.

In format 2, attention and head were true (of the type of the experts) or false (dense). A manifest
of that format stays so when it is written again, unless one of the two changes: then older versions
of mixchat cannot read the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.files import read_bytes, read_json_object, write_file
from mixchat.settings import models_dir

MANIFEST_FILE = "mixchat.json"
MANIFEST_COPY = "mixchat.copy.json"
MANIFESTS = (MANIFEST_FILE, MANIFEST_COPY)
CONVERSION_DIR = "conversion"  # while it is there, not all files have the manifest's layout
INPUTS_DIR = "expert-inputs"  # of a calibration
FORMAT = 3
_FORMATS = (2, 3)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}")
_QUANTIZATION: dict[str, tuple[object, ...]] = {
    "quant_type": ("nf3", "nf4", "fp4", "none"),
    "blocksize": (64,),
    "scales": ("absmax", "search", "calibrated", "given"),
    "layout": ("bitsandbytes", "cpu-packed"),
    "dtype": ("bfloat16", "float16", "float32"),
}
_DENSE_PARTS = ("attention", "head")
_KEYS = ("quant_type", "blocksize", "scales", "layout", *_DENSE_PARTS, "dtype")


@dataclass(frozen=True)
class Source:
    """The name of an installed model's checkpoint: a hub id and commit, a path, or "demo".

    `revision` is the branch, tag or commit that was requested.
    """

    repo: str
    commit: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """A small file's size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class WeightsRecord:
    """The size in bytes of a file of weights, and the SHA-256 of each of its tensors by name."""

    size: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The content of `mixchat.json`; `quantization` has the keys and values shown above.

    `format` is that of the file.
    """

    source: Source
    quantization: dict[str, Any]
    files: dict[str, FileRecord]
    weights: dict[str, WeightsRecord]
    format: int = FORMAT

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name."""
        return {name: record.size for name, record in (self.files | self.weights).items()}

    @property
    def size(self) -> int:
        """Return the bytes of all files of weights together, as a download's plan predicts them."""
        return sum(record.size for record in self.weights.values())

    def serialized(self) -> bytes:
        """Return the bytes of `mixchat.json`."""
        document: dict[str, Any] = {"format": self.format, **asdict(self)}
        how = {key: self.quantization[key] for key in _KEYS}
        if self.format == 2:
            how |= {part: how[part] != "none" for part in _DENSE_PARTS}
        document["quantization"] = how
        return (json.dumps({**document, "sha256": _digest(document)}, indent=1) + "\n").encode()


def read_manifest(directory: Path, name: str = MANIFEST_FILE) -> Manifest:
    """Read and check a model's manifest. Raises `CheckpointError` with one clear line."""
    if not is_installed(directory):
        raise CheckpointError(f"{directory}: not a finished model (no {MANIFEST_FILE})")
    try:
        return _read(directory / name)
    except CheckpointError as error:
        error.hint = error.hint or _remedy(directory)
        raise


def repair_hint(directory: Path) -> str:
    """Return the hint for an installed model with a damaged file."""
    return _elsewhere(directory) or (
        f"Run: mixchat repair {directory.name} (it fetches only what is damaged)."
    )


def _elsewhere(directory: Path) -> str | None:
    """Return the hint for a model outside of the data directory, which has no name."""
    if directory.absolute().parent == models_dir():
        return None
    return f"Copy it again: 'mixchat repair' works only on models in {models_dir()}."


def _remedy(directory: Path) -> str:
    """Return the hint for a manifest that cannot be read, with or without an intact copy."""
    if any(is_manifest(directory / name) for name in MANIFESTS):
        return repair_hint(directory)
    return _elsewhere(directory) or (
        f"Its copy is damaged, too: 'mixchat rm {directory.name}', and download the model again."
    )


def _read(path: Path) -> Manifest:
    raw = read_json_object(path)
    version = raw.get("format")
    if version not in _FORMATS:
        raise CheckpointError(
            f"{path}: format {version!r:.40} is not known; this mixchat reads formats "
            f"{' and '.join(map(str, _FORMATS))}",
            hint="Update mixchat. "
            + (_elsewhere(path.parent) or f"Or download it again: mixchat rm {path.parent.name}"),
        )
    if raw.pop("sha256", None) != _digest(raw):
        raise CheckpointError(f"{path}: damaged (its SHA-256 differs)")
    try:
        manifest = Manifest(
            source=Source(**raw["source"]),
            quantization={key: raw["quantization"][key] for key in _KEYS},
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
            weights={name: WeightsRecord(**record) for name, record in raw["weights"].items()},
            format=version,
        )
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: a part is missing or malformed") from None
    if version == 2:
        manifest = replace(manifest, quantization=_with_words(path, manifest.quantization))
    _check(path, manifest)
    return manifest


def _with_words(path: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization of format 2 as format 3 has it."""
    words = {}
    for part in _DENSE_PARTS:
        if type(quantization[part]) is not bool:
            raise _unknown(path, part, quantization[part])
        words[part] = quantization["quant_type"] if quantization[part] else "none"
    return quantization | words


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the copy, then `mixchat.json`, each atomically and durably."""
    for name in (MANIFEST_COPY, MANIFEST_FILE):
        write_file(directory / name, manifest.serialized())


def is_installed(directory: Path) -> bool:
    """Return whether a directory has a manifest, or its copy: they are written last."""
    return any((directory / name).is_file() for name in MANIFESTS)


def is_manifest(path: Path) -> bool:
    """Return whether the file is a manifest that can be read, to the byte as mixchat writes it."""
    try:
        return read_bytes(path) == _read(path).serialized()
    except CheckpointError:
        return False


def read_either_manifest(directory: Path) -> Manifest:
    """Read the manifest, or its copy where only that is intact.

    Raises `CheckpointError` where neither is.
    """
    try:
        return read_manifest(directory)
    except CheckpointError:
        if not is_manifest(directory / MANIFEST_COPY):
            raise
        return read_manifest(directory, MANIFEST_COPY)


def restore_manifests(directory: Path) -> None:
    """Write the intact one of manifest and copy over the other.

    Raises `CheckpointError` where neither is intact.
    """
    manifest = read_either_manifest(directory)
    for name in MANIFESTS:
        if not is_manifest(directory / name):
            write_file(directory / name, manifest.serialized())


def check_files(directory: Path, manifest: Manifest) -> None:
    """Ensure that a model can be loaded: it is not half converted, and each file has its size.

    Raises `CheckpointError` with the first fault.
    """
    if (directory / CONVERSION_DIR).exists():
        raise CheckpointError(
            f"{directory}: a conversion is running or was interrupted",
            hint=f"To finish it: {finishing_command(directory)}",
        )
    check_sizes(directory, manifest)


def finishing_command(directory: Path) -> str:
    """Return the command that finishes the conversion of a model."""
    command = "calibrate" if (directory / INPUTS_DIR).exists() else "convert"
    return f"mixchat {command} {directory.name}"


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compare each file's size with the manifest. Raises `CheckpointError` with the first fault."""
    for name, expected in manifest.sizes.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing", hint=repair_hint(directory))
        if (size := path.stat().st_size) != expected:
            raise CheckpointError(
                f"{path}: {size} bytes, but the manifest says {expected}",
                hint=repair_hint(directory),
            )


def _digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a document's canonical form: keys sorted, no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_quantization(path: Path, quantization: dict[str, Any]) -> None:
    """Raise `CheckpointError`, which names `path`, for values that a manifest cannot have."""
    four_bits = {"none": (), "fp4": ("fp4",)}.get(quantization["quant_type"], ("nf4",))
    of_parts = dict.fromkeys(_DENSE_PARTS, ("none", "int8", *four_bits))
    for key, allowed in (_QUANTIZATION | of_parts).items():
        value = quantization[key]
        if not any(value == known and type(value) is type(known) for known in allowed):
            raise _unknown(path, key, value)


def _unknown(path: Path, key: str, value: object) -> CheckpointError:
    return CheckpointError(f"{path}: {key} {value!r:.40} is not known to this mixchat")


def _check(path: Path, manifest: Manifest) -> None:
    check_quantization(path, manifest.quantization)
    source = manifest.source
    if not all(
        isinstance(text, str) for text in (source.repo, source.commit or "", source.revision or "")
    ):
        raise CheckpointError(f"{path}: the source is malformed")
    hashes = [record.sha256 for record in manifest.files.values()]
    for record in manifest.weights.values():
        if not isinstance(record.sha256, dict):
            raise CheckpointError(f"{path}: a record of weights is malformed")
        hashes += record.sha256.values()
    if not all(isinstance(text, str) for text in hashes):
        raise CheckpointError(f"{path}: a SHA-256 is malformed")
    for name, size in manifest.sizes.items():
        if not _NAME.fullmatch(name) or type(size) is not int or size < 0:
            raise CheckpointError(f"{path}: a file record is malformed: {name!r:.80}")
