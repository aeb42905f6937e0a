"""The header of a GGUF file, with its metadata and tensors. All of it is untrusted.

A file has a magic word, its version, the counts of tensors and of metadata, the metadata, the
tensors' names, shapes, types and offsets, and then their bytes. Numbers are little endian. The file
does not tell the length of its header, so it is read in growing pieces.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_piece
from mixchat.base.safetensors import Header, SafetensorsFile, TensorSpec
from mixchat.weights.matrix.gguf_format import tensor_spec

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # since version 2 counts have 64 bits; version 3 adds a variant in big endian
_HEADER_BYTES_MAX = 64_000_000  # with a vocabulary of 200,000 it has 12 MB
_FIRST_READ_BYTES = 1 << 20
_ENTRIES_MAX = 100_000  # of metadata and of tensors
_ITEMS_MAX = 1_000_000  # of a list; the largest vocabulary has half as many merges
_NAME_BYTES_MAX = 1_000
_DIMENSIONS_MAX = 4
_ALIGNMENT = 32
_STRING = 8
_ARRAY = 9
_SCALARS = "BbHhIif?..Qqd"  # by struct's and numpy's letters; types 8 and 9 are no scalars

ReadPiece = Callable[[int, int], "bytes | bytearray"]
"""Returns bytes of a file. Its arguments are their offset and their count."""


class GgufHeader(Header):
    """The header of a GGUF file. The shape of a tensor begins with its rows, unlike in the file.

    `metadata` has strings, numbers, and lists of either.
    """

    def __init__(
        self,
        entries: dict[str, tuple[TensorSpec, int]],
        metadata: Mapping[str, Any],
        size: int,
        where: str,
    ) -> None:
        self.where = where
        self.size = size
        self._text = b""
        self._entries = entries
        self.metadata = metadata


class GgufFile(SafetensorsFile):
    """An open GGUF file, whose `header` has been checked. Raises `CheckpointError`."""

    header: GgufHeader

    def __enter__(self) -> GgufFile:
        return self

    def _read_header(self) -> GgufHeader:
        read = partial(read_piece, self._fd)
        return read_header(read, os.fstat(self._fd).st_size, str(self.path))


def read_header(read: ReadPiece, size: int, where: str) -> GgufHeader:
    """Read the header of a file with `size` bytes. Raises `CheckpointError`."""
    cursor = _Cursor(read, size, where)
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{where}: not a GGUF file")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise CheckpointError(
            f"{where}: GGUF of version {version}, mixchat reads 2 and 3 in little endian"
        )
    tensors = cursor.count(_ENTRIES_MAX)
    entries = cursor.count(_ENTRIES_MAX)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text(_NAME_BYTES_MAX)
        if key in metadata:
            raise CheckpointError(f"{where}: its header has {key!r:.80} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    specs: list[tuple[TensorSpec, int]] = []
    for _ in range(tensors):
        name = cursor.text(_NAME_BYTES_MAX)
        if (dimensions := cursor.number("I")) > _DIMENSIONS_MAX:
            raise CheckpointError(f"{where}: {name!r:.80} has {dimensions} dimensions")
        # The file has the columns first, the rows last.
        shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))[::-1]
        if any(length >= 2**40 for length in shape):
            raise CheckpointError(f"{where}: the shape of {name!r:.80} is {shape!r:.80}")
        spec = tensor_spec(name, cursor.number("I"), shape, where)
        specs.append((spec, cursor.number("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{where}: the alignment is {alignment!r:.80}, not a power of two")
    return GgufHeader(
        _placed(specs, cursor.position, alignment, size, where), metadata, size, where
    )


class _Cursor:
    """Reads values from the beginning of a file, which is fetched in growing pieces."""

    def __init__(self, read: ReadPiece, size: int, where: str) -> None:
        self._read = read
        self._size = min(size, _HEADER_BYTES_MAX)
        self.where = where
        self._data = bytearray()
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._size:
            raise CheckpointError(f"{self.where}: not a GGUF file, or cut short")
        if end > len(self._data):
            # Each piece doubles the bytes, so that 12 MB take 5 requests to the hub.
            most = max(end, 2 * len(self._data), _FIRST_READ_BYTES)
            start = len(self._data)
            self._data += self._read(start, min(most, self._size) - start)
        taken = bytes(self._data[self.position : end])
        if len(taken) < count:
            raise CheckpointError(f"{self.where}: cut short")
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        # This is the shortest decimal number of this fp32, as config.json had it.
        return float(str(np.float32(value))) if code == "f" else value

    def count(self, most: int) -> int:
        count: int = self.number("Q")
        if count > most:
            raise CheckpointError(f"{self.where}: its header counts {count} of a kind, too many")
        return count

    def text(self, most: int = _HEADER_BYTES_MAX) -> str:
        data = self.take(self.count(most))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.where}: a text in its header is not UTF-8") from None

    def value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self.text()
        if value_type == _ARRAY:
            return self._array(self.number("I"), self.count(_ITEMS_MAX))
        return self.number(self._scalar(value_type))

    def _array(self, item_type: int, count: int) -> Any:
        if item_type == _STRING:
            return [self.text() for _ in range(count)]
        scalar = np.dtype(f"<{self._scalar(item_type)}")
        return np.frombuffer(self.take(count * scalar.itemsize), scalar).tolist()

    def _scalar(self, value_type: int) -> str:
        scalar = _SCALARS[value_type] if value_type < len(_SCALARS) else "."
        if scalar == ".":  # no scalar, such as a list of lists, which nothing needs
            raise CheckpointError(f"{self.where}: its header has a value of the type {value_type}")
        return scalar


def _placed(
    tensors: list[tuple[TensorSpec, int]], base: int, alignment: int, size: int, where: str
) -> dict[str, tuple[TensorSpec, int]]:
    """Return each tensor with the offset of its bytes, by name. No gap may lie between them."""
    header = base
    base = _aligned(base, alignment)
    end = 0
    entries = {}
    # A tensor without bytes has the offset of the next one, and comes first.
    for spec, offset in sorted(tensors, key=lambda tensor: (tensor[1], tensor[0].nbytes)):
        if offset != end:
            raise CheckpointError(f"{where}: the bytes of {spec.name!r:.80} are misplaced")
        if spec.name in entries:
            raise CheckpointError(f"{where}: {spec.name!r:.80} is there twice")
        entries[spec.name] = (spec, base + offset)
        end = _aligned(end + spec.nbytes, alignment)
    last = max((start + spec.nbytes for spec, start in entries.values()), default=header)
    if not last <= size <= base + end:
        raise CheckpointError(
            f"{where}: cut short or overlong: its header describes {last} bytes, it has {size}"
        )
    return entries


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
