"""GPUs on paper: a kind of torch device whose memory and arithmetic are the CPU's.

On them runs all code that is written for CUDA. Tensors are `PaperTensor`s, each with a tensor of
the CPU inside. Every operation on them comes to `_dispatch`, which computes it on the inner tensors
and is as strict as a GPU is:

- Tensors of different memories in one operation are an error.
- Each device has so many bytes; what does not fit raises `torch.OutOfMemoryError`. So does one
  allocation that a test chooses. Tensors take what torch's allocator takes for them
  (`paper_allocator.py`), and it keeps what is freed.
- Streams come out of torch's pool of 32. So a new one may be in use, and a capture on it would
  take in the work of another thread.
- Each device has a default stream of its own. Work on a tensor is work of the current stream of its
  device. An event belongs to the device on which it was first recorded: recording it on another
  one's stream is an error. A copy from one device to another waits for both, and nobody for it.
- `waits` counts what would wait for a GPU: copies that block, numbers that Python looks at, events.
  Waits on a stream other than a default one count as `side_waits`: they are those of the threads
  that move experts.
- A copy from page-locked RAM that does not block is carried out late: when its stream is waited
  for, or works on. Who reads the target too early, or overwrites the source, sees wrong numbers.
- A copy to page-locked RAM that does not block arrives when the host waits for it. To other RAM it
  is an error: nobody would know when the numbers are there.
- In a capture, torch (since 2.11) asks `is_pinned` of RAM, about the first byte of its storage.
- Where page-locking is refused, the next kernel of that thread fails, as CUDA reports it.
- Kernels in Triton run by its interpreter, and touch no memory but that of GPUs. They start on the
  current device, whatever the device of their tensors, and addresses in tables are multiples of 16.
  Graphs record and replay what is started, and refuse
  what CUDA refuses. `paper_runtime.py` describes the order of streams that is checked.

What they cannot show: speed. So measuring them gives the figures of a cheap card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from paper_kernels import DOUBLES
from paper_runtime import RUNTIME, PaperRuntime, Work
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton_interpreter import compute_as_gpus, confined_to

from mixchat.base import gpu
from mixchat.kernels.gpu import launch, toolchain
from mixchat.planning import measuring
from mixchat.planning.cards import Card
from mixchat.planning.machine_speeds import GPUSpeeds

KIND = "paper"
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
_SPLITS = ("aten::split", "aten::split_with_sizes")
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
    else:
        _check_memories(name, tensors)
    if name in _LOOKS or (name == "aten::index" and any(_is_mask(index) for index in args[1])):
        RUNTIME.wait(target)

    def compute() -> Any:
        inner = {key: _inner(value) for key, value in kwargs.items()}
        return function(*_mapped(_inner, args), **inner)

    alias = returns[0].alias_info if returns else None
    on = next((tensor.device for tensor in ours), target)
    if name == "aten::to" and RUNTIME.index_of(on) != RUNTIME.index_of(target):
        # On the inner tensors it would return the same one.
        function, alias = torch.ops.aten._to_copy.default, None
        args, kwargs = args[:1], {"dtype": ours[0].dtype, "device": target}
    if alias is not None and not alias.is_write:
        views = compute()
        if name in _SPLITS and ours[0].nbytes == ours[0].inner.untyped_storage().nbytes():
            RUNTIME.divided(views)
        return _mapped(lambda leaf: _placed(leaf, target), views)
    in_place = alias is not None
    made: list[Any] = []
    touches = [(tensor.inner, in_place) for tensor in ours]

    def run(stream: Any, number: int) -> None:
        result = compute()
        if not in_place:
            made.append(_mapped(lambda leaf: _placed(leaf, target), result))
            if target.type == KIND and on.type == KIND:
                # A copy to another GPU is work of both.
                stream, number = RUNTIME.joined(on, target)
            for leaf in _leaves([made[-1]]):
                if isinstance(leaf, PaperTensor):
                    RUNTIME.wrote(stream, number, leaf.inner.untyped_storage())

    if not in_place and not name.startswith(("aten::empty", "aten::new_empty")):
        RUNTIME.refuse_in_capture(f"memory for {name}")
    if on.type == KIND:
        is_kernel = not name.startswith(("aten::empty", "aten::new_empty"))
        RUNTIME.start(Work(RUNTIME.index_of(on), lambda: touches, run, is_kernel))
    else:
        run(None, 0)
    return kwargs.get("out", args[0]) if in_place else made[0]


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
    ours = [tensor for tensor in (source, target) if isinstance(tensor, PaperTensor)]
    if not ours:
        return target.copy_(source)
    down = not isinstance(target, PaperTensor)
    outside = target if down else source
    on_paper = len(ours) == 2
    late = not on_paper and non_blocking and RUNTIME.is_locked(outside)
    if not on_paper and not late:
        # Without a lock the bytes are taken to another place first: the source may change then.
        assert not (down and non_blocking), "nobody knows when these numbers are on the CPU"
        RUNTIME.wait(ours[0].device, blocks=down or not non_blocking)
        RUNTIME.refuse_in_capture("a copy of RAM that is not locked")
    elif late and not RUNTIME.is_pinned(outside):
        RUNTIME.refuse_in_capture("a copy of RAM whose storage begins before what is locked")

    def run(stream: Any, number: int) -> None:
        if late and down:
            stream.arriving.append((number, _inner(source).clone(), target))
        elif late:
            stream.late.append((source, _inner(target)))
        else:
            _inner(target).copy_(_inner(source))

    touches = [(tensor.inner, tensor is target) for tensor in ours]
    if on_paper:
        RUNTIME.joined(source.device, target.device)  # a copy between two GPUs is work of both
    RUNTIME.start(Work(RUNTIME.index_of(ours[-1].device), lambda: touches, run, on_paper))
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


def _implement(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what torch calls for an operation on a device of this kind."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(operation, function, "PrivateUse1")
        return function

    return register


def _install() -> None:
    """Make the kind of device known to torch, which a process can do once."""
    _setup_privateuseone_for_python_backend(KIND)
    setattr(torch, KIND, RUNTIME)

    @_implement("empty_strided")
    def empty_strided(size: Any, stride: Any, *, dtype: Any, device: Any, **_: Any) -> Any:
        return _placed(torch.empty_strided(size, stride, dtype=dtype), device)

    @_implement("empty.memory_format")
    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return _placed(torch.empty(size, dtype=dtype), device)

    @_implement("_copy_from")
    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
        return _copy(source, target, non_blocking)


_install()
compute_as_gpus()


def _start(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any]) -> None:
    """Run a Triton kernel, by the interpreter or its double, as work of the current device."""
    tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
    assert all(isinstance(tensor, PaperTensor) for tensor in tensors), "a kernel reads RAM"
    device = RUNTIME.current_device()
    if any(RUNTIME.index_of(tensor.device) != device for tensor in tensors):
        raise RuntimeError(f"CUDA error: device {device} is current, and tensors are on another")
    inner = [_inner(item) for item in arguments]

    def touches() -> list[tuple[torch.Tensor, bool]]:
        found = [(tensor.inner, True) for tensor in tensors]
        # Addresses in a table are read, too.
        tables = [tensor.inner for tensor in tensors if tensor.dtype == torch.int64]
        addresses = [address for table in tables for address in table.flatten().tolist()]
        return found + [(memory, False) for memory in RUNTIME.memory_at(addresses)]

    def run(stream: Any, number: int) -> None:
        if kernel.__name__ in DOUBLES and not RUNTIME.interprets:
            DOUBLES[kernel.__name__](*inner, **constants)
        else:
            with confined_to(RUNTIME.extents()):
                kernel[grid](*inner, **constants)

    chosen = tuple(sorted((key, str(value)) for key, value in constants.items()))
    loaded = kernel.__name__, chosen, tuple(map(_specialized, inner))
    RUNTIME.start(Work(device, touches, run), kernel=loaded)


def _specialized(argument: Any) -> tuple[Any, ...]:
    """Return those properties of an argument for each of which Triton loads a kernel of its own."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return (type(argument),)


def _of_cheap_card(device: torch.device) -> GPUSpeeds:
    return replace(GPUSpeeds.of_card(Card.of_size(gpu.total_memory(device))), source="measured")


@contextlib.contextmanager
def in_place_of_cuda() -> Iterator[PaperRuntime]:
    """Let mixchat take paper GPUs for those of CUDA, of which there is one, with 4 GB free."""
    RUNTIME.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "KIND", KIND)
        patch.setattr(launch, "start", _start)
        patch.setattr(toolchain, "missing", lambda: None)  # the interpreter needs no compiler
        patch.setattr(measuring, "measure_gpu", _of_cheap_card)
        yield RUNTIME
