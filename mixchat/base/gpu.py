"""Asks a GPU's runtime for the GPUs, their memory, streams and waits.

No other module names `torch.cuda`, so that the suite can run all code for GPUs on another device.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

KIND = "cuda"


def is_gpu(device: torch.device) -> bool:
    """Return whether the device is a GPU."""
    return device.type == KIND


def count() -> int:
    """Return the number of GPUs that torch can use."""
    runtime = _runtime()
    return int(runtime.device_count()) if runtime.is_available() else 0


def use(device: torch.device) -> None:
    """Make the GPU this thread's default."""
    _runtime().set_device(device)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the GPU is this thread's current one."""
    if not is_gpu(device):
        return contextlib.nullcontext()
    inside: AbstractContextManager[object] = _runtime().device(device)
    return inside


def name(device: torch.device) -> str:
    """Return a GPU's name for people."""
    return str(_runtime().get_device_name(device))


def is_amd() -> bool:
    """Return whether torch is built for AMD's GPUs."""
    return torch.version.hip is not None


def has_bf16(device: torch.device) -> bool:
    """Return whether a GPU's matrix units take bf16, as NVIDIA's do since 2020."""
    version = capability(device) if is_gpu(device) else None
    return version is None or version >= (8, 0)


def total_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory."""
    return int(_runtime().get_device_properties(device).total_memory)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are free."""
    return int(_runtime().mem_get_info(device)[0])


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's compute capability, None for a GPU of AMD."""
    if torch.version.hip is not None:
        return None  # torch gives the numbers of the architecture, as 11 and 0 of gfx1100
    major, minor = _runtime().get_device_capability(device)
    return int(major), int(minor)


def number_in(error: torch.OutOfMemoryError) -> int | None:
    """Return the number of the GPU whose memory ran out, or None."""
    match = re.search(r"\bGPU (\d+)\b", str(error))
    return None if match is None else int(match[1])


def release_unused(device: torch.device) -> None:
    """Give memory that torch keeps back to the GPU."""
    if is_gpu(device):
        _runtime().empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if is_gpu(device):
        _runtime().synchronize(device)


def streams(device: torch.device) -> Any:
    """Return torch's module of a device's streams, which do nothing on a CPU."""
    return torch.get_device_module(device)


class PageLockError(RuntimeError):
    """The system refuses to page-lock RAM. WSL2 limits it."""


def locked_block(size: int, device: torch.device) -> torch.Tensor:
    """Return `size` bytes of page-locked RAM, so that copies to a GPU run at the bus's speed.

    Graphs can copy to it. Raises `PageLockError`.
    """
    # In a capture, torch asks whether the first byte of a tensor's storage is locked. So the
    # storage is all that is locked, in pages of its own, and not a part of it.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # It may be made in inference mode, and filled by a thread that is not in it.
    with torch.inference_mode(False):
        block = torch.frombuffer(pages, dtype=torch.uint8)
    runtime = _runtime().cudart()
    address = block.data_ptr()
    if int(runtime.cudaHostRegister(address, size, 0)):
        # CUDA reports the refusal once more, at this thread's next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        raise PageLockError
    # Views of the block may outlive it, but not its storage. The pages go back to the system after
    # that, since it may give the address to another block.
    weakref.finalize(block.untyped_storage(), _unlock, runtime, address, pages).atexit = False
    return block


def _unlock(runtime: Any, address: int, pages: mmap.mmap) -> None:
    """Unlock pages that are still there."""
    runtime.cudaHostUnregister(address)


@contextlib.contextmanager
def captured(device: torch.device) -> Iterator[Any]:
    """Yield a graph of the kernels and copies that are started inside. `replay` starts them.

    They do not run before. All have to have run once, because loading a kernel cannot be captured.
    Nothing inside may wait for the GPU or take memory.
    """
    runtime = _runtime()
    # torch hands out 32 streams of each priority by turns, also those in use. A capture on the
    # stream of the thread that moves experts would take in its copies.
    graph = runtime.CUDAGraph()
    stream = runtime.Stream(device, priority=-1)
    # `torch.cuda.graph` would collect Python's garbage each time, longer than a capture takes.
    with current(device), runtime.stream(stream):
        # By default a capture forbids other threads much, and one thread moves experts meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()


def read(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one device on the CPU, with one wait for a GPU.

    The tensors with the widest numbers come first, for alignment.
    """
    if not is_gpu(tensors[0].device):
        return list(tensors)
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
    if not flat:
        return [tensor.new_empty(tensor.shape, device="cpu") for tensor in tensors]
    copied = (torch.cat(flat) if len(flat) > 1 else flat[0]).cpu()
    pieces = torch.split(copied, [tensor.nbytes for tensor in tensors])
    return [
        piece.view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _runtime() -> Any:
    return torch.get_device_module(KIND)
