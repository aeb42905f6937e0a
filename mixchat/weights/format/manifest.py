"""The manifest of an installed model, `mixchat.json`, written last to mark a finished model.

{"format": 7,
 "source": {"repo": "mistralai/Mixtral-8x7B-Instruct-v0.1", "commit": "...", "revision": null},
 "quantization": {"quant_type": "nf4", "blocksize": 64, "scales": "search", "attention": "int8",
                  "head": "int8", "dtype": "bfloat16"},
 "files": {"config.json": {"size": 123, "sha256": "..."}, ...},
 "weights": {"shared.safetensors": {"size": 456, "sha256": {"model.norm.weight": "...", ...},
                                    "quantization": {}}, ...},
 "checkpoint": {"model.layers.0.block_sparse_moe.experts.0.w1.weight": "...", ...},
 "sha256": "..."}

Weights have a SHA-256 for each tensor, so that a damaged one can be rebuilt alone. A file's own
`quantization` has the values in which it differs from the model's. If the experts of a layer have
other types, these are their `quant_type`, and `down` if w2 has another type than w1 and w3.
`checkpoint` has the SHA-256s of the checkpoint's tensors. The last SHA-256 is over all other keys.
`mixchat.copy.json` has the same bytes, because nothing else could restore a damaged manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_bytes, read_json_object, write_file
from mixchat.base.settings import models_dir

MANIFEST_FILE = "mixchat.json"
MANIFEST_COPY = "mixchat.copy.json"
MANIFESTS = (MANIFEST_FILE, MANIFEST_COPY)
FORMAT = 7
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}")
_EXPERT_TYPES = ("nf4", "mxfp4", "trellis2", "trellis3", "none")
_QUANTIZATION: dict[str, tuple[object, ...]] = {
    "quant_type": _EXPERT_TYPES,
    "down": (None, *_EXPERT_TYPES),
    "scales": ("absmax", "search", "calibrated", "given"),
    "dtype": ("bfloat16", "float16", "float32"),
}
_DENSE_PARTS = ("attention", "head")
_MIXED = ("quant_type", "down", "blocksize")
_OF_A_FILE = ("scales", *_MIXED)
_KEYS = ("quant_type", "blocksize", "scales", *_DENSE_PARTS, "dtype")


@dataclass(frozen=True)
class Source:
    """The checkpoint of an installed model, by a hub id and commit, a path, or "demo".

    `revision` is the requested branch, tag or commit.
    """

    repo: str
    commit: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """A small file's size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class WeightsRecord:
    """The size in bytes of a file of weights, and the SHA-256 of each tensor by name.

    quantization: the values in which the file differs from the manifest's `quantization`.
    """

    size: int
    sha256: dict[str, str]
    quantization: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of `mixchat.json`."""

    source: Source
    quantization: dict[str, Any]
    files: dict[str, FileRecord]
    weights: dict[str, WeightsRecord]
    checkpoint: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name."""
        return {name: record.size for name, record in (self.files | self.weights).items()}

    @property
    def size(self) -> int:
        return sum(record.size for record in self.weights.values())

    def quantization_of(self, name: str) -> dict[str, Any]:
        """Return the quantization of a file of weights."""
        return self.quantization | self.weights[name].quantization

    @property
    def is_mixed(self) -> bool:
        """Return whether the experts' types differ by layer or matrix."""
        return any(key in record.quantization for record in self.weights.values() for key in _MIXED)

    @property
    def quant_type(self) -> str:
        """Return the type of the experts, "mixed" if there are several."""
        return "mixed" if self.is_mixed else str(self.quantization["quant_type"])

    def serialized(self) -> bytes:
        document: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        document["quantization"] = {key: self.quantization[key] for key in _KEYS}
        return _dumped({**document, "sha256": _digest(document)})

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of its bytes in hex, which differs if the model does."""
        return hashlib.sha256(self.serialized()).hexdigest()


def read_manifest(directory: Path, name: str = MANIFEST_FILE) -> Manifest:
    """Read and check a model's manifest. Raises `CheckpointError`."""
    if not is_installed(directory):
        raise CheckpointError(f"{directory}: not a finished model (no {MANIFEST_FILE})")
    try:
        return _read(directory / name)
    except CheckpointError as error:
        if not error.hint and any(is_manifest(directory / manifest) for manifest in MANIFESTS):
            error.hint = repair_hint(directory)
        error.hint = error.hint or _hint_outside(directory)
        error.hint = error.hint or (
            f"Its copy is damaged, too: 'mixchat rm {directory.name}', "
            "and download the model again."
        )
        raise


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare each file's size with the manifest. Raises `CheckpointError`."""
    for name, expected in manifest.sizes.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing", hint=repair_hint(directory))
        if (size := path.stat().st_size) != expected:
            raise CheckpointError(
                f"{path}: {size} bytes, but the manifest says {expected}",
                hint=repair_hint(directory),
            )


def repair_hint(directory: Path) -> str:
    """Return the hint for an installed model with a damaged file."""
    return _hint_outside(directory) or (
        f"Run: mixchat repair {directory.name} (it fetches only what is damaged)."
    )


def _hint_outside(directory: Path) -> str | None:
    if directory.absolute().parent == models_dir():
        return None
    return f"Copy it again: 'mixchat repair' works only on models in {models_dir()}."


def _read(path: Path) -> Manifest:
    raw = read_json_object(path)
    version = raw.get("format")
    if version != FORMAT:
        raise _unreadable(
            path, f"made by another mixchat (format {version!r:.40}, this one reads {FORMAT})"
        )
    if raw.pop("sha256", None) != _digest(raw):
        raise CheckpointError(f"{path}: damaged (its SHA-256 differs)")
    try:
        manifest = Manifest(
            source=Source(**raw["source"]),
            quantization={key: raw["quantization"][key] for key in _KEYS},
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
            weights={name: WeightsRecord(**record) for name, record in raw["weights"].items()},
            checkpoint=dict(raw["checkpoint"].items()),
        )
        _check(path, manifest)
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: a part is missing or malformed") from None
    return manifest


def _unreadable(path: Path, message: str) -> CheckpointError:
    """Return the error for an intact manifest of another mixchat."""
    return CheckpointError(
        f"{path}: {message}", hint="Update mixchat, or remove the model and download it again."
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the copy, then `mixchat.json`, each atomically and durably."""
    # If the power fails in between, mixchat.json still has the old content, and is whole.
    for name in (MANIFEST_COPY, MANIFEST_FILE):
        write_file(directory / name, manifest.serialized())


def is_installed(directory: Path) -> bool:
    """Return whether a directory has a manifest, or its copy."""
    return any((directory / name).is_file() for name in MANIFESTS)


def is_manifest(path: Path) -> bool:
    """Return whether the file is a manifest with exactly the bytes that mixchat writes."""
    try:
        _read(path)
        return read_bytes(path) == _dumped(read_json_object(path))
    except CheckpointError:
        return False


def read_either_manifest(directory: Path) -> Manifest:
    """Read the manifest, or its copy if only that is intact. Raises `CheckpointError`."""
    try:
        return read_manifest(directory)
    except CheckpointError:
        if not is_manifest(directory / MANIFEST_COPY):
            raise
        return read_manifest(directory, MANIFEST_COPY)


def restore_manifests(directory: Path) -> None:
    """Make manifest and copy equal, from the one that is intact. Raises `CheckpointError`."""
    intact = [name for name in MANIFESTS if is_manifest(directory / name)]
    # Without an intact one, reading raises the error that says what is damaged.
    data = (
        read_bytes(directory / intact[0])
        if intact
        else read_either_manifest(directory).serialized()
    )
    for name in MANIFESTS:
        if name not in intact or read_bytes(directory / name) != data:
            write_file(directory / name, data)


def _dumped(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a document with sorted keys and no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_quantization(path: Path, quantization: dict[str, Any]) -> None:
    four_bits = () if quantization["quant_type"] == "none" else ("nf4",)
    depending: dict[str, tuple[object, ...]] = {
        "blocksize": (32,) if quantization["quant_type"] == "mxfp4" else (64,),
        **dict.fromkeys(_DENSE_PARTS, ("none", "int8", "int6", *four_bits)),
    }
    for key, allowed in (_QUANTIZATION | depending).items():
        value = quantization.get(key)
        # The types are compared, too, since 64.0 == 64 and True == 1.
        if not any(value == known and type(value) is type(known) for known in allowed):
            raise _unreadable(path, f"{key} {value!r:.40} is not known to this mixchat")


def _check(path: Path, manifest: Manifest) -> None:
    source = manifest.source
    records = manifest.weights.values()
    _check_quantization(path, manifest.quantization)
    for record in records:
        if not record.quantization.keys() <= {*_OF_A_FILE}:
            raise CheckpointError(f"{path}: a record of weights is malformed")
        _check_quantization(path, manifest.quantization | record.quantization)
    texts = [source.repo, source.commit or "", source.revision or "", *manifest.checkpoint.values()]
    texts += [record.sha256 for record in manifest.files.values()]
    texts += [sha256 for record in records for sha256 in record.sha256.values()]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: a part is missing or malformed")
    # A name with a slash would be a path to a file outside of the model.
    for name, size in manifest.sizes.items():
        if not _NAME.fullmatch(name) or type(size) is not int or size < 0:
            raise CheckpointError(f"{path}: a file record is malformed: {name!r:.80}")
