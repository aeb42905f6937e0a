"""The manifest of a kept model, `mixchat.json`: written last, so that its presence means "whole".

{"format": 1,
 "source": {"repo": "mistralai/Mixtral-8x7B-Instruct-v0.1", "commit": "..."},
 "quantization": {"quant_type": "nf4", "blocksize": 64, "layout": "cpu-packed",
                  "attention": false, "head": false, "dtype": "bfloat16"},
 "files": {"shared.safetensors": {"size": 123, "sha256": "..."}, ...}}
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError

MANIFEST_FILE = "mixchat.json"
FORMAT = 1
_QUANTIZATION = {
    "quant_type": ("nf4", "none"),
    "blocksize": (64,),
    "layout": ("bitsandbytes", "cpu-packed"),
    "attention": (False, True),
    "head": (False, True),
    "dtype": ("bfloat16", "float32"),
}


@dataclass(frozen=True)
class Source:
    """Where a kept model came from: a hub id with its commit, a directory's path, or "demo"."""

    repo: str
    commit: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `mixchat.json` says. `quantization` has the keys shown at the top of this module."""

    source: Source
    quantization: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def read_manifest(directory: Path) -> Manifest:
    """Read and check a kept model's manifest. Raises `CheckpointError` with one clear line."""
    path = directory / MANIFEST_FILE
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a finished model (no {MANIFEST_FILE})") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: cannot be read as JSON") from None
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: format {version!r} is not known; this mixchat reads format {FORMAT}",
            hint="Update mixchat, or download the model again.",
        )
    try:
        manifest = Manifest(
            source=Source(**raw["source"]),
            quantization={key: raw["quantization"][key] for key in _QUANTIZATION},
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
        )
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: a part is missing or malformed") from None
    _check(path, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `mixchat.json`, durably and at once."""
    document = {"format": FORMAT, **asdict(manifest)}
    write_file(directory / MANIFEST_FILE, (json.dumps(document, indent=1) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(path: Path, manifest: Manifest) -> None:
    for key, allowed in _QUANTIZATION.items():
        value = manifest.quantization[key]
        if not any(value == known and type(value) is type(known) for known in allowed):
            raise CheckpointError(f"{path}: {key} {value!r} is not known to this mixchat")
    for name, record in manifest.files.items():
        if not name or Path(name).name != name or type(record.size) is not int:
            raise CheckpointError(f"{path}: a file record is malformed: {name!r}")
