"""The runtime of GPUs on paper: their streams, events and memories, as `paper_gpu.py` describes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

DEVICES = 3
GB = 10**9


class Stream:
    """A queue of a device's work, of which only copies that do not block are carried out late."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        index = getattr(device, "index", device)
        self.index: int = RUNTIME.current_device() if index is None else index
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def finish(self) -> None:
        """Carry out what is late."""
        while self.late:
            source, target = self.late.pop(0)
            target.copy_(source)

    def synchronize(self) -> None:
        RUNTIME.wait(self.index)
        self.finish()


class Event:
    """A place in a stream's queue; it belongs to the stream's device once it is recorded."""

    _stream: Stream

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or RUNTIME.current_stream()
        if hasattr(self, "_stream") and self._stream.index != stream.index:
            raise RuntimeError("an event of one device is recorded on another one's stream")
        self._stream = stream

    def wait(self, stream: Stream | None = None) -> None:
        self._stream.finish()

    def synchronize(self) -> None:
        RUNTIME.wait(self._stream.index)
        self._stream.finish()

    def query(self) -> bool:
        return not self._stream.late


@dataclass
class _Memory:
    total: int
    taken: int = 0


class PaperRuntime:
    """Stands in for `torch.cuda`: the functions that mixchat asks, under the same names.

    `fail_at`: raise `torch.OutOfMemoryError` at the allocation with this number, counted in
    `allocations`. `refuses_locks`: page-lock nothing.
    """

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self._thread = threading.local()
        self._taken: dict[int, int] = {}  # bytes of each allocation that is alive
        self.locked: dict[int, int] = {}  # bytes by address
        self.memories = [_Memory(0) for _ in range(DEVICES)]
        self.reset()

    def reset(self) -> None:
        """Count from 0 again; memory that is taken or locked stays so, until it is given back."""
        for memory in self.memories:
            memory.total = 4 * GB
        self.waits = self.side_waits = self.allocations = 0
        self.fail_at: int | None = None
        self.refuses_locks = False
        self.devices = 1
        self._thread.__dict__.clear()
        self._defaults = [Stream(number) for number in range(DEVICES)]

    # Called by torch and mixchat.

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def set_device(self, device: torch.device | int) -> None:
        self._thread.device = device if isinstance(device, int) else device.index or 0

    def get_device_name(self, device: Any = None) -> str:
        return "GPU on paper"

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(name="GPU on paper", total_memory=self.memory(device).total)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        memory = self.memory(device)
        return max(memory.total - memory.taken, 0), memory.total

    def empty_cache(self) -> None:
        """Nothing is kept for later use here."""

    def synchronize(self, device: Any = None) -> None:
        self.wait(device)

    def current_stream(self, device: Any = None) -> Stream:
        """Return this thread's current stream of a device, or of the current device."""
        index = self.index_of(device)
        return self._streams().get(index, self._defaults[index])

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one of its device, and the device the current one."""
        streams, device = self._streams(), self.current_device()
        before = self.current_stream(stream.index)
        streams[stream.index] = stream
        self.set_device(stream.index)
        try:
            yield
        finally:
            streams[stream.index] = before
            self.set_device(device)

    def _streams(self) -> dict[int, Stream]:
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return streams

    def cudart(self) -> PaperRuntime:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.refuses_locks:
            self._thread.error = "CUDA error: operation not supported"
            return 801
        assert address not in self.locked, "page-locked twice"
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is drawn on a paper GPU."""

    # Called by tensors.

    def index_of(self, device: torch.device | int | None) -> int:
        """Return a device's number; without one, that of the current device."""
        index = device.index if isinstance(device, torch.device) else device
        return self.current_device() if index is None else index

    def memory(self, device: torch.device) -> _Memory:
        return self.memories[self.index_of(device)]

    def wait(self, device: torch.device | int | None = None, *, blocks: bool = True) -> None:
        """Count a wait, unless the operation does not block; then its stream has done its work."""
        if not blocks:
            return
        stream = self.current_stream(device)
        if stream in self._defaults:
            self.waits += 1
        else:
            self.side_waits += 1
        stream.finish()

    def launch(self, device: torch.device, *, views: bool) -> None:
        """Start a kernel, which finds what its stream has copied; CUDA tells of errors here."""
        if views:
            return
        self.current_stream(device).finish()
        error, self._thread.error = getattr(self._thread, "error", None), None
        if error is not None:
            raise RuntimeError(error)

    def is_locked(self, tensor: torch.Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(at <= first and last <= at + size for at, size in self.locked.items())

    def allocated(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Count the memory of a tensor that is new, and of no view."""
        storage = tensor.untyped_storage()
        key, size, memory = storage._cdata, storage.nbytes(), self.memory(device)
        if key in self._taken or not size:
            return
        self.allocations += 1
        if self.allocations == self.fail_at or memory.taken + size > memory.total:
            raise torch.OutOfMemoryError(
                f"paper out of memory. Tried to allocate {size} bytes. GPU {self.index_of(device)} "
                f"has a total capacity of {memory.total} bytes"
            )
        self._taken[key] = size
        memory.taken += size
        weakref.finalize(storage, self._freed, key, memory).atexit = False

    def _freed(self, key: int, memory: _Memory) -> None:
        memory.taken -= self._taken.pop(key)


RUNTIME = PaperRuntime()
