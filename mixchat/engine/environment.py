"""Sets the environment that torch reads when it is imported, and imports it."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from mixchat.base import interrupts, machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size

# With less, native code ends the process while torch or a tokenizer is imported.
_MIN_ADDRESS_SPACE_BYTES = 950_000_000
_TORCH_VARIABLES = {
    # With large pages for large tensors, reading the weights of an expert is 5 to 8% faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # By default OpenMP's idle threads keep spinning. If a core is busy, decoding then loses three
    # quarters of its speed.
    "GOMP_SPINCOUNT": "10000",
}


def prepare_environment() -> None:
    """Import torch, with variables that it reads then unless they are set.

    Only in mixchat's own process does this touch signals and the garbage collector. Raises
    `ResourceError` if a `ulimit` leaves too little memory for it.
    """
    with _torch_variables():
        if "torch" not in sys.modules:
            _check_address_space()
            with _without_collections(), interrupts.starting():
                if threading.current_thread() is not threading.main_thread():
                    _load_library()
                import_module("torch")
        sys.modules["torch"].empty(1)  # the allocator reads its variable now


def _check_address_space() -> None:
    free = machine.memory_left_by_ulimit().get("ulimit -v")
    if free is not None and free < _MIN_ADDRESS_SPACE_BYTES:
        raise ResourceError(
            f"not enough memory: {format_least(_MIN_ADDRESS_SPACE_BYTES)} needed, "
            f"ulimit -v leaves {format_size(free)}",
            hint="Raise that limit.",
        )


@contextmanager
def _torch_variables() -> Iterator[None]:
    """Set variables in this block alone, so that the caller's programs do not inherit them."""
    added = {name: value for name, value in _TORCH_VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage in this block, and never again what lives at its end.

    Torch makes 250,000 objects, and collections that visit them took .3 s of the start. A program
    that uses mixchat keeps its collector as it is, because a frozen object of its own is never
    collected.
    """
    if not interrupts.are_installed():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load_library() -> None:
    """Load torch's largest library while the main thread goes on.

    Its import would keep a person from typing for .2 s. A failure is left to the import.
    """
    from ctypes import CDLL
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return
    # `CDLL(path)` would hold Python's lock, and a call of a function does not.
    dlopen = CDLL(None).dlopen
    # In the order and with the mode of torch's __init__.py.
    for name, mode in (("libtorch_global_deps.*", os.RTLD_GLOBAL), ("libtorch_cpu.*", 0)):
        for path in Path(spec.origin).parent.glob(f"lib/{name}"):
            dlopen(os.fsencode(path), os.RTLD_NOW | mode)
