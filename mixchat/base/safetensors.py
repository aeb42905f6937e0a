"""Safetensors files, read and written with plain reads and writes.

A mapped file that is cut short would kill the process with SIGBUS. A file has eight bytes with the
header's length (little endian), the header in JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from mixchat.base import system
from mixchat.base.errors import CheckpointError
from mixchat.base.files import (
    open_regular,
    read_all,
    read_piece,
    reading,
    rename_durably,
    temporary_path,
)
from mixchat.base.progress import Task

ALIGNMENT = 4096
# Bytes, 100 times a Mixtral's. 100 MB, the reference's limit, take 2 GB to read.
_MAX_HEADER = 10_000_000
_MAX_DIMENSIONS = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PART = re.compile(r"(.+)\[(0|[1-9][0-9]{0,8})\]")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, element type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def split_part(name: str) -> tuple[str, int | None]:
    """Return ("X", 3) for "X[3]", the fourth part of the stacked tensor X, else the name, None."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


class Header:
    """The header of a safetensors file, with the tensors in the order of their bytes.

    A part of a stacked tensor X [E, ...] has the name `X[3]`, with a spec and bytes of its own.
    `size` is the whole file's, in bytes. `where` names it in messages. Raises `CheckpointError`.
    """

    def __init__(self, text: bytes | bytearray, size: int, where: str) -> None:
        self.where = where
        self.size = size
        self._text = text
        try:
            raw = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{where}: not a safetensors file (bad header)") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: not a safetensors file (bad header)")
        raw.pop("__metadata__", None)
        end = 8 + len(text)
        entries = [_parse_entry(where, name, entry, end) for name, entry in raw.items()]
        entries.sort(key=lambda entry: (entry[1], entry[0].nbytes))
        for spec, start in entries:
            if start != end:
                raise CheckpointError(f"{where}: the bytes of {spec.name!r:.80} are misplaced")
            end += spec.nbytes
        if end != size:
            raise CheckpointError(
                f"{where}: cut short or overlong: its header describes {end} bytes, it has {size}"
            )
        self._entries = {spec.name: (spec, start) for spec, start in entries}

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], where: str) -> Header:
        """Return the header of a file with these tensors, whose data starts at a page."""
        start = header_bytes(specs)
        return cls(start[8:], len(start) + sum(spec.nbytes for spec in specs), where)

    @property
    def beginning(self) -> bytes:
        """Return the file's bytes before the tensors."""
        return len(self._text).to_bytes(8, "little") + self._text

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for spec, _ in self._entries.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's spec. Raises `CheckpointError`."""
        return self._entry(name)[0]

    def start(self, name: str) -> int:
        """Return the offset of the tensor's bytes from the file's beginning."""
        return self._entry(name)[1]

    def _entry(self, name: str) -> tuple[TensorSpec, int]:
        if name in self._entries:
            return self._entries[name]
        whole, index = split_part(name)
        spec, start = self._entries.get(whole, (None, 0))
        if spec is None or index is None or not spec.shape or index >= spec.shape[0]:
            raise CheckpointError(f"{self.where}: there is no tensor {name!r:.120}")
        own = replace(spec, name=name, shape=spec.shape[1:])
        return own, start + index * own.nbytes


def header_length(first: bytes | bytearray, size: int, where: str) -> int:
    """Return the length of the header from a file's first bytes. Raises `CheckpointError`."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(_MAX_HEADER, size - 8):
        raise CheckpointError(f"{where}: not a safetensors file, or cut short")
    return length


class SafetensorsFile:
    """An open safetensors file, whose `header` has been checked. Raises `CheckpointError`."""

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        self._fd = self._direct_fd = -1
        try:
            with reading(path):
                self._fd = open_regular(path, follow=follow)
                self.header = self._read_header()  # a file in GGUF reads its own
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """Return a new tensor with the bytes of `name`. Raises `CheckpointError`."""
        spec = self.header.spec(name)
        block = torch.empty(spec.nbytes, dtype=torch.uint8)
        self.read_into(block, self.header.start(name))
        return block.view(spec.dtype).view(spec.shape)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return a new tensor with these rows of `name`, whose numbers [n] may repeat.

        Each is read once, in the file's order, because a hard disk seeks forward.
        """
        spec = self.header.spec(name)
        first = self.header.start(name)
        size = spec.nbytes // spec.shape[0]
        numbers = rows.tolist()
        positions = {number: position for position, number in enumerate(sorted(set(numbers)))}
        starts = [first + number * size for number in positions]
        assert all(first <= start < first + spec.nbytes for start in starts), "of another tensor"
        block = torch.empty(len(starts), *spec.shape[1:], dtype=spec.dtype)
        if len(starts) > 1:
            with contextlib.suppress(OSError):  # the read will say what is wrong
                for start in starts:  # many at once take a quarter as long
                    system.advise(self._fd, start, size, needed=True)
        for start, row in zip(starts, block.view(torch.uint8), strict=True):
            self.read_into(row, start)
        return (
            block if numbers == [*positions] else block[[positions[number] for number in numbers]]
        )

    def open_direct(self) -> bool:
        """Open the file past the page cache, and return whether that is possible."""
        if self._direct_fd < 0 and system.DIRECT:
            with contextlib.suppress(OSError):
                descriptor = open_regular(self.path, os.O_RDONLY | system.DIRECT)
                # Another process may have replaced the file since.
                if os.path.samestat(os.fstat(descriptor), os.fstat(self._fd)):
                    self._direct_fd = descriptor
                else:
                    os.close(descriptor)
        return self._direct_fd >= 0

    def read_into(self, block: torch.Tensor, start: int, *, direct: bool = False) -> None:
        """Fill `block` (uint8, contiguous, on the CPU) from offset `start` on.

        `direct`, after `open_direct`, reads past the page cache. Then start, address and length
        must be multiples of the disk's block size.
        """
        view = block.numpy().data
        try:
            done = read_all(self._direct_fd if direct else self._fd, start, view)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:  # larger blocks, or a file cut short
                self.read_into(block, start)
                return
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        if done < len(view):
            raise CheckpointError(
                f"{self.path}: cut short: {start + len(view)} bytes are needed, "
                f"{start + done} are there"
            )

    def close(self) -> None:
        for descriptor in (self._fd, self._direct_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._direct_fd = -1

    def __del__(self) -> None:
        # A dropped engine would leave 33 files open. From descriptor 1024 on, the terminal's
        # library, which uses select(), loops forever.
        self.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> Header:
        size = os.fstat(self._fd).st_size
        length = header_length(read_piece(self._fd, 0, 8), size, str(self.path))
        return Header(read_piece(self._fd, 8, length), size, str(self.path))


def _parse_entry(where: str, name: str, raw: Any, base: int) -> tuple[TensorSpec, int]:
    try:
        dtype, shape, (start, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{where}: the header's entry for {name!r:.80} is malformed"
        ) from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: {name!r:.80} has the unsupported type {dtype!r:.80}")
    known = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    numbers = [*shape, start, end] if known else [None]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise CheckpointError(f"{where}: the header's entry for {name!r:.80} is malformed")
    spec = TensorSpec(name, _DTYPES[dtype], tuple(shape))
    if end - start != spec.nbytes:
        raise CheckpointError(
            f"{where}: {name!r:.80} should take {spec.nbytes} bytes, "
            f"its header gives it {end - start}"
        )
    return spec, base + start


class SafetensorsWriter:
    """A context manager that writes one file with these tensors, in their order.

    The bytes go to `<name>.mixchat.tmp`, which is renamed at the end, or removed after an error.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        self._todo = list(specs)[::-1]
        self._temporary = temporary_path(path)
        # So that nothing is written through a link planted under this name.
        self._temporary.unlink(missing_ok=True)
        self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed in __exit__
        self._file.write(header_bytes(self._todo[::-1]))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which must be as announced."""
        spec = self._todo.pop()
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape)), (
            f"expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}"
        )
        self._file.write(tensor_bytes(tensor))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            if error_type is None:
                assert not self._todo, f"{self._todo[-1].name} was not written"
                self._file.flush()
                os.fsync(self._file.fileno())
                rename_durably(self._temporary, self.path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, if possible without a copy."""
    view: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in hex."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def wrong_tensors(
    descriptor: int, header: Header, digests: Mapping[str, str], task: Task
) -> Iterator[str]:
    """Yield the tensors of an open file whose bytes have another SHA-256 than in `digests`.

    `task` advances by their bytes. Raises `OSError` if the file cannot be read.
    """
    for name, sha256 in digests.items():
        data = memoryview(bytearray(header.spec(name).nbytes))
        done = read_all(descriptor, header.start(name), data)
        if hashlib.sha256(data[:done]).hexdigest() != sha256:
            yield name
        task.advance(len(data))


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """Return a file's bytes before these tensors, padded to a multiple of 4096."""
    entries = {}
    end = 0
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
