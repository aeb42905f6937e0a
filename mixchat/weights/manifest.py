"""The manifest of a kept model, `mixchat.json`: written last, so that its presence means "whole".

{"format": 1,
 "source": {"repo": "mistralai/Mixtral-8x7B-Instruct-v0.1", "commit": "...", "revision": null},
 "quantization": {"quant_type": "nf4", "blocksize": 64, "layout": "cpu-packed",
                  "attention": false, "head": false, "dtype": "bfloat16"},
 "files": {"shared.safetensors": {"size": 123, "sha256": "..."}, ...}}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.files import read_json_object, write_file

MANIFEST_FILE = "mixchat.json"
FORMAT = 1
DOWNLOAD_AGAIN = "Remove the directory and download the model again."
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
    """Where a kept model came from: a hub id with its commit, a directory's path, or "demo".

    `revision` is the branch, tag or commit that was asked for.
    """

    repo: str
    commit: str | None = None
    revision: str | None = None


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
    if not path.exists():
        raise CheckpointError(f"{directory}: not a finished model (no {MANIFEST_FILE})")
    raw = read_json_object(path)
    version = raw.get("format")
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


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare each file's size with the manifest. Raises `CheckpointError` with the first fault."""
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing", hint=DOWNLOAD_AGAIN)
        if (size := path.stat().st_size) != record.size:
            raise CheckpointError(
                f"{path}: {size} bytes, but the manifest says {record.size}", hint=DOWNLOAD_AGAIN
            )


def _check(path: Path, manifest: Manifest) -> None:
    for key, allowed in _QUANTIZATION.items():
        value = manifest.quantization[key]
        if not any(value == known and type(value) is type(known) for known in allowed):
            raise CheckpointError(f"{path}: {key} {value!r} is not known to this mixchat")
    source = manifest.source
    if not all(
        isinstance(text, str) for text in (source.repo, source.commit or "", source.revision or "")
    ):
        raise CheckpointError(f"{path}: the source is malformed")
    for name, record in manifest.files.items():
        plain = bool(name) and Path(name).name == name
        if not plain or type(record.size) is not int or not isinstance(record.sha256, str):
            raise CheckpointError(f"{path}: a file record is malformed: {name!r}")
