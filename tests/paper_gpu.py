"""GPUs on paper: a kind of torch device whose memory and arithmetic are the CPU's.

On them runs all code that is written for CUDA. Tensors are `PaperTensor`s, each with a tensor of
the CPU inside. Every operation on them comes to `_dispatch`, which computes it on the inner tensors
and is as strict as a GPU is:

- Tensors of different memories in one operation are an error.
- Each device has so many bytes; what does not fit raises `torch.OutOfMemoryError`. So does one
  allocation that a test chooses.
- Each device has a default stream of its own. Work on a tensor is work of the current stream of its
  device. An event belongs to the device on which it was first recorded: recording it on another
  one's stream is an error. A copy from one device to another waits for both, and nobody for it.
- `waits` counts what would wait for a GPU: copies that block, numbers that Python looks at, events.
  Waits on a stream other than a default one count as `side_waits`: they are those of the threads
  that move experts.
- A copy from page-locked RAM that does not block is carried out late: when its stream is waited
  for, or works on. Who reads the target too early, or overwrites the source, sees wrong numbers.
- A copy to the CPU that does not block is an error: nobody would know when the numbers are there.
- Where page-locking is refused, the next kernel of that thread fails, as CUDA reports it.

What they cannot show: speed, most races between streams, the sizes that CUDA's allocator rounds to,
and bitsandbytes' kernels, whose place a product with the dequantized matrix takes.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mixchat.base import gpu
from mixchat.weights.matrix.nf4 import FourBitCodes

KIND = "paper"
DEVICES = 3
GB = 10**9
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
# Python waits for their results: numbers, or shapes that hang on numbers.
_LOOKS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal")
_library = torch.library.Library("aten", "IMPL")


class PaperTensor(torch.Tensor):
    """A tensor on a paper GPU. `inner` is on the CPU and has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> PaperTensor:
        with torch.inference_mode(False):  # a view of another kind than its base is refused
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # These three ask for memory, and never come to `__torch_dispatch__`.
        if function is torch.Tensor.tolist:
            RUNTIME.wait(args[0].device)
            return args[0].inner.tolist()
        if function is torch.Tensor.data_ptr:
            return args[0].inner.data_ptr()
        if function is torch.Tensor.numpy:
            raise TypeError("can't convert a paper GPU's tensor to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return _dispatch(function, args, kwargs or {})


def _dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [*_leaves(args), *kwargs.values()]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PaperTensor)]
    name, returns = function._schema.name, function._schema.returns
    if name == "aten::copy_":
        return _copy(args[1], args[0], *args[2:], **kwargs)
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    target = asked[0] if asked else ours[0].device
    if name in _COPIES:
        if target.type != KIND:
            RUNTIME.wait(ours[0].device, blocks=not kwargs.get("non_blocking"))
        for tensor in ours:
            RUNTIME.current_stream(tensor.device).finish()
    else:
        _check_memories(name, tensors)
        alias = returns[0].alias_info if returns else None
        RUNTIME.launch(target, views=alias is not None and not alias.is_write)
    if name in _LOOKS or (name == "aten::index" and any(_is_mask(index) for index in args[1])):
        RUNTIME.wait(target)
    result = function(
        *_mapped(_inner, args), **{key: _inner(value) for key, value in kwargs.items()}
    )
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        return kwargs.get("out", args[0])
    return _mapped(lambda leaf: _placed(leaf, target), result)


# torch's own functions for trees know many kinds, and took half of a test's time.
def _leaves(nested: Any) -> Iterator[Any]:
    """Yield what is in tuples and lists, of which arguments and results of operations consist."""
    for part in nested:
        if isinstance(part, (tuple, list)):
            yield from _leaves(part)
        else:
            yield part


def _mapped(change: Callable[[Any], Any], nested: Any) -> Any:
    """Return the same tuples and lists of changed leaves."""
    if isinstance(nested, (tuple, list)):
        return type(nested)([_mapped(change, part) for part in nested])
    return change(nested)


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between any two memories: also what torch calls past `__torch_dispatch__`."""
    down = isinstance(source, PaperTensor) and not isinstance(target, PaperTensor)
    up = isinstance(target, PaperTensor) and not isinstance(source, PaperTensor)
    devices = {tensor.device for tensor in (source, target) if isinstance(tensor, PaperTensor)}
    if down or (up and source.dim()):
        (device,) = devices
        if up and non_blocking and RUNTIME.is_locked(source):
            RUNTIME.current_stream(device).late.append((source, target.inner))
            return target
        # Without a lock the bytes are taken to another place first: the source may change then.
        RUNTIME.wait(device, blocks=down or not non_blocking)
        assert not (down and non_blocking), "nobody knows when these numbers are on the CPU"
    for device in devices:
        RUNTIME.current_stream(device).finish()
    _inner(target).copy_(_inner(source))
    return target


def _check_memories(name: str, tensors: list[torch.Tensor]) -> None:
    """Numbers and indices may be on the CPU; all else has to be in one memory."""
    if name in ("aten::index", "aten::index_put_"):
        tensors = [tensor for tensor in tensors if isinstance(tensor, PaperTensor)]
    where = {str(tensor.device) for tensor in tensors if tensor.dim()}
    if len(where) > 1:
        raise RuntimeError(f"{name}: tensors in different memories: {sorted(where)}")


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _inner(leaf: Any) -> Any:
    if isinstance(leaf, PaperTensor):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == KIND else leaf


def _placed(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or device.type != KIND:
        return leaf
    device = torch.device(KIND, RUNTIME.current_device() if device.index is None else device.index)
    RUNTIME.allocated(leaf, device)
    return PaperTensor(leaf, device)


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


def _implement(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what torch calls for an operation on a device of this kind."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(operation, function, "PrivateUse1")
        return function

    return register


def _install() -> PaperRuntime:
    """Make the kind of device known to torch, which a process can do once."""
    _setup_privateuseone_for_python_backend(KIND)
    runtime = PaperRuntime()
    setattr(torch, KIND, runtime)

    @_implement("empty_strided")
    def empty_strided(size: Any, stride: Any, *, dtype: Any, device: Any, **_: Any) -> Any:
        return _placed(torch.empty_strided(size, stride, dtype=dtype), device)

    @_implement("empty.memory_format")
    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return _placed(torch.empty(size, dtype=dtype), device)

    @_implement("_copy_from")
    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
        return _copy(source, target, non_blocking)

    return runtime


RUNTIME = _install()


@contextlib.contextmanager
def in_place_of_cuda() -> Iterator[PaperRuntime]:
    """Let mixchat take paper GPUs for those of CUDA, of which there is one, with 4 GB free."""
    matmul = FourBitCodes.matmul

    def on_paper(
        kind: FourBitCodes, x: Any, codes: Any, absmax: Any, shape: Any, *, exact: bool = False
    ) -> Any:
        if not isinstance(x, PaperTensor):
            return matmul(kind, x, codes, absmax, shape, exact=exact)
        absmax = absmax.float()
        _check_memories("matmul_4bit", [x, codes, absmax])
        RUNTIME.launch(x.device, views=False)
        weight = kind.dequantize(codes.inner, absmax.inner, shape, x.dtype)
        return _placed(torch.nn.functional.linear(x.inner, weight), x.device)

    RUNTIME.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "KIND", KIND)
        patch.setattr(FourBitCodes, "matmul", on_paper)
        yield RUNTIME
