"""Checks the finished parts of an unfinished model against its journal.

A disk may have changed a byte since it was written. In the finished model it would stand under the
SHA-256 of the right bytes, and `verify` alone would find it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

from mixchat.errors import CheckpointError
from mixchat.files import open_regular
from mixchat.progress import NoProgress, Progress, Task, running
from mixchat.safetensors import Header, SafetensorsFile
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import layouts
from mixchat.weights.make.spill import ASIDE_PREFIX

Digests = Mapping[str, Mapping[str, str]]


def damaged(
    directory: Path, blueprint: Blueprint, made: Digests, progress: Progress
) -> dict[str, set[str]]:
    """The tensors of `made` whose bytes are no longer those that were written, by file."""
    headers = {name: layout.header for name, layout in layouts(blueprint).items()}
    headers |= _headers_aside(directory)
    found = {}
    here = {name: _known(headers[name], made[name]) for name in made if name in headers}
    whole = sum(headers[name].spec(tensor).nbytes for name in here for tensor in here[name])
    with running(progress if whole else NoProgress(), "checking what is done", whole) as task:
        for name, digests in here.items():
            wrong = set(_wrong(directory / name, headers[name], digests, task))
            # What was put aside is one file, which is written again as a whole.
            found[name] = set(made[name]) if wrong and name.startswith(ASIDE_PREFIX) else wrong
    return {name: wrong for name, wrong in found.items() if wrong}


def _headers_aside(directory: Path) -> dict[str, Header]:
    headers = {}
    for path in directory.glob(ASIDE_PREFIX + "*"):
        with suppress(CheckpointError), SafetensorsFile(path) as file:
            headers[path.name] = file.header
    return headers


def _known(header: Header, digests: Mapping[str, str]) -> dict[str, str]:
    """Those of the tensors that the file has, in the order of their bytes."""
    return {spec.name: digests[spec.name] for spec in header.specs if spec.name in digests}


def _wrong(path: Path, header: Header, digests: Mapping[str, str], task: Task) -> Iterator[str]:
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            for name, sha256 in digests.items():
                size = header.spec(name).nbytes
                file.seek(header.start(name))
                if hashlib.sha256(read_most(file, size)).hexdigest() != sha256:
                    yield name
                task.advance(size)
    except OSError:  # it is not there, or the disk cannot read it
        yield from digests


def read_most(file: FileIO, size: int) -> memoryview:
    """The next `size` bytes, fewer where the file ends before."""
    data, done = memoryview(bytearray(size)), 0
    while done < size and (count := file.readinto(data[done:])):
        done += count
    return data[:done]
