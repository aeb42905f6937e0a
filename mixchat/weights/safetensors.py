"""Reading and writing safetensors files with plain reads and writes: no mapping, nothing executed.

A mapped file that is cut short kills the process with SIGBUS; a short `pread` is an error with a
name. The format (github.com/huggingface/safetensors): eight bytes with the header's length, little
endian; the header, JSON; the tensors' bytes, one behind the other without holes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mixchat.errors import CheckpointError
from mixchat.files import give_name, temporary_name

ALIGNMENT = 4096
_MAX_HEADER = 100_000_000  # the reference implementation's own limit, in bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, element type and shape: what a header says of it, less its place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    spec: TensorSpec
    start: int  # from the beginning of the file


class SafetensorsFile:
    """An open safetensors file whose header has been read and checked.

    `specs` lists the tensors in the order of their bytes. Raises `CheckpointError` where the file
    is missing, cut short, or not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self._entries = self._read_header()
        except OSError as error:
            self.close()
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except BaseException:
            self.close()
            raise

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors, in the order of their bytes in the file."""
        return [entry.spec for entry in self._entries.values()]

    def spec(self, name: str) -> TensorSpec:
        """The tensor of this name. Raises `CheckpointError` where there is none."""
        return self._entry(name).spec

    def start(self, name: str) -> int:
        """Where the tensor's bytes begin, counted from the beginning of the file."""
        return self._entry(name).start

    def read(self, name: str) -> torch.Tensor:
        """A new tensor with the bytes of `name`. Raises `CheckpointError` where they are short."""
        entry = self._entry(name)
        block = torch.empty(entry.spec.nbytes, dtype=torch.uint8)
        self.read_into(block, entry.start)
        return block.view(entry.spec.dtype).view(entry.spec.shape)

    def read_into(self, block: torch.Tensor, start: int) -> None:
        """Fill `block` (uint8, contiguous, on the CPU) from byte `start` of the file on."""
        view, done = block.numpy().data, 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: cut short: {start + len(view)} bytes are needed, "
                    f"{start + done} are there"
                )
            done += count

    def close(self) -> None:
        """Close the file; further reads fail."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}") from None

    def _read_header(self) -> dict[str, _Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{self.path}: not a safetensors file, or cut short")
        try:
            header = json.loads(os.pread(self._fd, length, 8).decode("utf-8"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{self.path}: not a safetensors file (bad header)") from None
        return _check_header(self.path, header, 8 + length, size)


def _check_header(path: Path, header: Any, base: int, size: int) -> dict[str, _Entry]:
    """The header's entries in the order of their bytes; every byte of the file is accounted for."""
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (bad header)")
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, name, raw, base) for name, raw in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.spec.nbytes))
    end = base
    for entry in entries:
        if entry.start != end:
            raise CheckpointError(f"{path}: the bytes of {entry.spec.name!r} are misplaced")
        end += entry.spec.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: cut short or overlong: its header describes {end} bytes, it has {size}"
        )
    return {entry.spec.name: entry for entry in entries}


def _parse_entry(path: Path, name: str, raw: Any, base: int) -> _Entry:
    try:
        dtype, shape, (start, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name!r} has the unsupported type {dtype!r}")
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed")
    spec = TensorSpec(name, _DTYPES[dtype], tuple(shape))
    if end - start != spec.nbytes:
        raise CheckpointError(
            f"{path}: {name!r} should take {spec.nbytes} bytes, its header gives it {end - start}"
        )
    return _Entry(spec, base + start)


class SafetensorsWriter:
    """Writes one file whose tensors are known beforehand, in their order, hashing as it goes.

    The bytes go to `<name>.tmp`; `finish` syncs it, gives it its name and syncs the directory, so
    that a file under its own name is always whole. The data begins on a 4096-byte boundary.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        self._todo = list(specs)[::-1]
        self._temporary = temporary_name(path)
        self._hash = hashlib.sha256()
        self._size = 0
        # A fresh file: a link planted under the temporary name is not written through.
        self._temporary.unlink(missing_ok=True)
        self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed in finish or abort
        self._write(_header(self._todo[::-1]))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which must be `name` with the type and shape announced."""
        spec = self._todo.pop()
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape)), (
            f"expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}"
        )
        self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> tuple[int, str]:
        """Make the file durable under its name; its size in bytes and its SHA-256 in hex."""
        assert not self._todo, f"{self._todo[-1].name} was not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        give_name(self._temporary, self.path)
        return self._size, self._hash.hexdigest()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def _header(specs: list[TensorSpec]) -> bytes:
    entries, end = {}, 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
