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
from types import ModuleType
from typing import Any

from mixchat.base import interrupts, machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size

# With less, native code ends the process while torch or a tokenizer is imported.
_MIN_ADDRESS_SPACE_BYTES = 950_000_000
# They tell torch.compile and tensors without data which shape each operation gives. That took .2 of
# the .9 s of torch's import.
_UNUSED = ("torch._meta_registrations", "torch.distributed._meta_registrations")
# Numpy multiplies no matrices here, but would start threads for that. Torch would look through all
# packages for devices of other makers.
_NOT_NEEDED = {"OPENBLAS_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def import_less() -> None:
    """Leave out what mixchat does not use when torch is imported, unless a variable is set.

    For processes that run nothing else. In another one, torch.compile might be used.
    """
    for name, value in _NOT_NEEDED.items():
        os.environ.setdefault(name, value)
    for name in _UNUSED:
        sys.modules.setdefault(name, _LoadedOnUse(name))


class _LoadedOnUse(ModuleType):
    """A module that is imported when one of its attributes is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which anyone asks of all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


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
