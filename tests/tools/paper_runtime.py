"""The runtime of GPUs on paper: their streams, events and memories, as `paper_gpu.py` describes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from paper_allocator import Allocator, Block

DEVICES = 3
GB = 10**9
_POOL = 32  # streams of a device and a priority


class Stream:
    """A queue of a device's work, which knows what of other streams' work was done before.

    Copies from RAM that do not block are carried out late. Copies to RAM arrive when the host
    waits. `seen` holds, for each stream that this one has waited for, how much of its work.
    """

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        index = getattr(device, "index", device)
        self.index: int = RUNTIME.current_device() if index is None else index
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arriving: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.seen: dict[Stream, int] = {}
        self._threads: set[threading.Thread] = set()  # that gave work
        self._lock = threading.RLock()  # several threads give work to one stream

    def begin(self) -> int:
        """Count a piece of work, which comes after all that the host has waited for."""
        with self._lock:
            self.finish()
            self._threads.add(threading.current_thread())
            self.done += 1
            self.see(RUNTIME.host_saw)
            return self.done

    @property
    def has_another_thread(self) -> bool:
        me = threading.current_thread()
        return any(thread.is_alive() and thread is not me for thread in list(self._threads))

    def see(self, seen: dict[Stream, int]) -> None:
        for stream, done in list(seen.items()):  # other threads add some
            self.seen[stream] = max(self.seen.get(stream, 0), done)

    def snapshot(self) -> dict[Stream, int]:
        return {**self.seen, self: self.done}

    def has_seen(self, stream: Stream, done: int) -> bool:
        return stream is self or self.seen.get(stream, 0) >= done

    def finish(self) -> None:
        """Carry out what is late."""
        with self._lock:
            while self.late:
                source, target = self.late.pop(0)
                target.copy_(source)

    def deliver(self, done: int) -> None:
        """Let the host see copies to RAM of the first `done` pieces of work."""
        while self.arriving and self.arriving[0][0] <= done:
            _, source, target = self.arriving.pop(0)
            target.copy_(source)

    def synchronize(self) -> None:
        RUNTIME.wait(self.index, stream=self)


class Event:
    """A place in a stream's queue; it belongs to the stream's device once it is recorded."""

    _stream: Stream

    def __init__(self, *, blocking: bool = False) -> None:
        self._saw: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        RUNTIME.refuse_in_capture("an event")
        stream = stream or RUNTIME.current_stream()
        if hasattr(self, "_stream") and self._stream.index != stream.index:
            raise RuntimeError("an event of one device is recorded on another one's stream")
        self._stream, self._saw = stream, stream.snapshot()

    def wait(self, stream: Stream | None = None) -> None:
        self._stream.finish()
        (stream or RUNTIME.current_stream()).see(self._saw)

    def synchronize(self) -> None:
        RUNTIME.wait(self._stream.index, saw=self._saw)
        self._stream.finish()
        self._stream.deliver(self._saw[self._stream])

    def query(self) -> bool:
        return not self._stream.late


class Graph:
    """A `torch.cuda.CUDAGraph`: work that was captured, each piece with what it touches."""

    def __init__(self) -> None:
        self.work: list[Work] = []

    def capture_begin(self, *, capture_error_mode: str = "global") -> None:
        """Record work of this thread, instead of doing it, until `capture_end`."""
        RUNTIME.refuse_in_capture("a capture")
        assert not RUNTIME.is_default(RUNTIME.current_stream()), "CUDA captures no default stream"
        assert not RUNTIME.current_stream().has_another_thread, "its work would be captured"
        assert capture_error_mode == "thread_local", "other threads lock memory meanwhile"
        RUNTIME.capturing = self

    def capture_end(self) -> None:
        RUNTIME.capturing = None

    def replay(self) -> None:
        RUNTIME.refuse_in_capture("a replay")
        RUNTIME.launches += 1
        for work in self.work:
            RUNTIME.carry_out(work)


class _Uses:
    """Who wrote and read the parts of a storage, which begin at `starts`, in bytes.

    There is one part, until the storage is divided. Streams may use different parts at once.
    """

    def __init__(self) -> None:
        self.starts = [0]
        self.writers: list[tuple[Stream, int] | None] = [None]
        self.readers: list[dict[Stream, int]] = [{}]

    def divide(self, starts: Iterable[int]) -> None:
        merged = sorted({*self.starts, *starts})
        before = [bisect_right(self.starts, start) - 1 for start in merged]
        self.writers = [self.writers[part] for part in before]
        self.readers = [dict(self.readers[part]) for part in before]
        self.starts = merged

    def parts(self, tensor: torch.Tensor) -> range:
        if len(self.starts) == 1:
            return range(1)
        first = tensor.storage_offset() * tensor.itemsize
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = first + tensor.itemsize * sum((size - 1) * stride for size, stride in sizes)
        return range(bisect_right(self.starts, first) - 1, bisect_right(self.starts, last))


@dataclass
class Work:
    """A kernel or a copy on a device. `touches`: memory, and whether each is written."""

    device: int
    touches: Callable[[], list[tuple[torch.Tensor, bool]]]
    run: Callable[[Stream, int], object]
    is_kernel: bool = True


@dataclass
class _Memory:
    """The bytes of a device, and those of its tensors. The allocator takes some more."""

    total: int
    taken: int = 0
    allocator: Allocator = field(default_factory=Allocator)


class PaperRuntime:
    """Stands in for `torch.cuda`: the functions that mixchat asks, under the same names.

    `launches` counts what the host starts: kernels, copies and graphs. `kernels` counts those that
    run, in graphs too. Work on memory that another stream wrote, without having waited for it, is
    an error, and so is writing what another stream may still read. A capture takes kernels that
    have run before, copies that do not block, and operations in place. `fail_at`: raise
    `torch.OutOfMemoryError` at the allocation with this number, counted in `allocations`.
    `refuses_locks`: page-lock nothing. `capability`: CUDA's, of all devices.
    """

    Event, CUDAGraph = Event, Graph

    def __init__(self) -> None:
        self._thread = threading.local()
        self._taken: dict[int, int] = {}  # bytes of each allocation that is alive
        self._places: dict[int, Any] = {}  # allocations by their addresses
        self.locked: dict[int, int] = {}  # bytes by address
        self.memories = [_Memory(0) for _ in range(DEVICES)]
        self.reset()

    def reset(self) -> None:
        """Count from 0 again; memory that is taken or locked stays so, until it is given back."""
        for memory in self.memories:
            memory.total = 4 * GB
        self.waits = self.side_waits = self.allocations = self.launches = self.kernels = 0
        self.host_saw: dict[Stream, int] = {}
        self._uses = defaultdict[int, _Uses](_Uses)
        self._loaded: set[Any] = set()
        self.fail_at: int | None = None
        self.refuses_locks = self.interprets = False
        self.devices = 1
        self.capability = (8, 6)
        self._thread.__dict__.clear()
        self._defaults = [Stream(number) for number in range(DEVICES)]
        self._pools: dict[tuple[int, int], list[Stream]] = {}

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

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return self.capability

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        memory = self.memory(device)
        return max(memory.total - memory.allocator.reserved, 0), memory.total

    def empty_cache(self) -> None:
        for memory in self.memories:
            memory.allocator.empty()

    def Stream(self, device: Any = None, priority: int = 0) -> Stream:
        """Return one of 32 streams, which torch hands out by turns, also those in use."""
        index = self.index_of(device)
        pool = self._pools.setdefault((index, priority), [])
        pool.append(Stream(index) if len(pool) < _POOL else pool.pop(0))
        return pool[-1]

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

    @contextlib.contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

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

    @property
    def capturing(self) -> Graph | None:
        return getattr(self._thread, "graph", None)

    @capturing.setter
    def capturing(self, graph: Graph | None) -> None:
        self._thread.graph = graph

    def is_default(self, stream: Stream) -> bool:
        return stream in self._defaults

    def refuse_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted in a capture: {what}")

    def wait(
        self,
        device: torch.device | int | None = None,
        *,
        blocks: bool = True,
        stream: Stream | None = None,
        saw: dict[Stream, int] | None = None,
    ) -> None:
        """Count a wait of the host, for a stream or for the part of its work that `saw` names."""
        if not blocks:
            return
        self.refuse_in_capture("a wait")
        stream = stream or self.current_stream(device)
        if self.is_default(self.current_stream(device)):
            self.waits += 1
        else:
            self.side_waits += 1
        stream.finish()
        for each, done in (saw or stream.snapshot()).items():
            self.host_saw[each] = max(self.host_saw.get(each, 0), done)
        if saw is None:
            stream.deliver(stream.done)

    def start(self, work: Work, *, kernel: Any = None) -> None:
        """Do a piece of work, or record it. `kernel` is what has to be loaded first."""
        if self.capturing is not None:
            if kernel is not None and kernel not in self._loaded:
                raise RuntimeError(f"CUDA error: a kernel is loaded in a capture: {kernel}")
            self.capturing.work.append(work)
            return
        if kernel is not None:
            self._loaded.add(kernel)
        self.launches += 1
        self.carry_out(work)

    def carry_out(self, work: Work) -> None:
        """Do a piece of work in the current stream; CUDA tells of earlier errors here."""
        stream = self.current_stream(work.device)
        number = stream.begin()
        self.kernels += work.is_kernel
        error, self._thread.error = getattr(self._thread, "error", None), None
        if error is not None:
            raise RuntimeError(error)
        for tensor, writes in work.touches():
            uses = self._uses[tensor.untyped_storage()._cdata]
            for part in uses.parts(tensor):
                self._touch(stream, number, uses, part, writes)
        work.run(stream, number)

    def joined(self, source: torch.device, target: torch.device) -> tuple[Stream, int]:
        """Let the streams of a copy wait for each other. Return the target's, and its work."""
        streams = self.current_stream(source), self.current_stream(target)
        if streams[0] is not streams[1]:
            streams[0].see(streams[1].snapshot())
            streams[1].see(streams[0].snapshot())
        return streams[1], streams[1].done

    def wrote(self, stream: Stream, number: int, storage: Any) -> None:
        """Note who made a new tensor."""
        uses = self._uses[storage._cdata]
        uses.writers = [(stream, number)] * len(uses.starts)

    def divided(self, parts: Sequence[torch.Tensor]) -> None:
        """Note that a storage consists of these parts, which have nothing to do with each other."""
        starts = (part.storage_offset() * part.itemsize for part in parts)
        self._uses[parts[0].untyped_storage()._cdata].divide(starts)

    def _touch(self, stream: Stream, number: int, uses: _Uses, part: int, writes: bool) -> None:
        writer, readers = uses.writers[part], uses.readers[part]
        if writer is not None and not stream.has_seen(*writer):
            raise RuntimeError("a stream uses what another one writes, and did not wait for it")
        if writes:
            if not all(stream.has_seen(*reader) for reader in readers.items()):
                raise RuntimeError("a stream writes what another one may still read")
            readers.clear()
            uses.writers[part] = stream, number
        else:
            readers[stream] = number

    def is_locked(self, tensor: torch.Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(at <= first and last <= at + size for at, size in self.locked.items())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return what torch's `is_pinned` does: it asks about the first byte of the storage."""
        first = tensor.untyped_storage().data_ptr()
        return any(at <= first < at + size for at, size in self.locked.items())

    def allocated(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Count the memory of a tensor that is new, and of no view."""
        storage = tensor.untyped_storage()
        key, size, memory = storage._cdata, storage.nbytes(), self.memory(device)
        if key in self._taken or not size:
            return
        self.allocations += 1
        block = None
        if self.allocations != self.fail_at:
            block = memory.allocator.take(size, memory.total)
        if block is None:
            raise torch.OutOfMemoryError(
                f"paper out of memory. Tried to allocate {size} bytes. GPU {self.index_of(device)} "
                f"has a total capacity of {memory.total} bytes"
            )
        if self.capturing is not None:
            memory.allocator.free(block)
            self.refuse_in_capture("memory")
        self._taken[key] = size
        self._uses.pop(key, None)
        self._places[storage.data_ptr()] = weakref.ref(storage)
        memory.taken += size
        freed = weakref.finalize(storage, self._freed, key, storage.data_ptr(), memory, block)
        freed.atexit = False

    def _freed(self, key: int, address: int, memory: _Memory, block: Block) -> None:
        memory.taken -= self._taken.pop(key)
        memory.allocator.free(block)
        self._places.pop(address, None)
        self._uses.pop(key, None)

    def memory_at(self, addresses: Iterable[int]) -> list[torch.Tensor]:
        """Return the first byte of the parts of allocations at some of these addresses."""
        places = sorted(self._places)
        found = []
        for address in addresses:
            number = bisect_right(places, address) - 1
            storage = self._places[places[number]]() if number >= 0 else None
            if storage is not None and address < storage.data_ptr() + storage.nbytes():
                byte = torch.empty(0, dtype=torch.uint8)
                found.append(byte.set_(storage, address - storage.data_ptr(), (1,)))
        return found

    def extents(self) -> list[tuple[int, int]]:
        """Return the address and the bytes of each allocation."""
        storages = (reference() for reference in list(self._places.values()))
        return [(each.data_ptr(), each.nbytes()) for each in storages if each is not None]


RUNTIME = PaperRuntime()
