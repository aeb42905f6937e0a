"""Sets the environment that torch reads when it is imported, and imports it."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixchat.base import interrupts, machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size

# With less, native code ends the process while torch or a tokenizer is imported.
_MIN_ADDRESS_SPACE_BYTES = 950_000_000


def prepare_environment() -> None:
    """Set variables that torch reads, unless they are set, and import it.

    Raises `ResourceError` if a `ulimit` leaves too little memory for it.
    """
    # With large pages for large tensors, reading the weights of an expert is 5 to 8% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # By default OpenMP's idle threads keep spinning. If a core is busy, decoding then loses three
    # quarters of its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "torch" in sys.modules:
        return
    free = machine.memory_left_by_ulimit().get("ulimit -v")
    if free is not None and free < _MIN_ADDRESS_SPACE_BYTES:
        raise ResourceError(
            f"not enough memory: {format_least(_MIN_ADDRESS_SPACE_BYTES)} needed, "
            f"ulimit -v leaves {format_size(free)}",
            hint="Raise that limit.",
        )
    with interrupts.starting(), _without_collections():
        if threading.current_thread() is not threading.main_thread():
            _load_library()
        import torch  # noqa: F401


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage in this block, and never again what lives at its end.

    Torch makes 250,000 objects, and collections that visit them took .3 s of the start.
    """
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
