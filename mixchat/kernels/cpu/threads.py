"""Runs a compiled function on several cores at once, on torch's threads."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# libgomp, LLVM's libomp and Intel's all have GCC's entry point.
_NEEDED = ("GOMP_parallel", "omp_get_num_threads", "omp_get_max_threads", "omp_set_num_threads")


class NativeFunction:
    """A compiled function, which takes a pointer. The code lives as long as `owner`."""

    def __init__(self, address: int, owner: object) -> None:
        self.address = address
        self._owner = owner
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(self, arguments: ctypes.Array[ctypes.c_int64], threads: int) -> None:
        """Call it from `threads` threads with the address of `arguments`. Wait for all of them."""
        address = ctypes.addressof(arguments)
        if threads == 1:
            self._call(address)
            return
        library = _library()
        if library is not None:
            library.GOMP_parallel(self.address, address, threads, 0)
            return
        pool = _pool(threads - 1)
        futures = [pool.submit(self._call, address) for _ in range(threads - 1)]
        self._call(address)
        for future in futures:
            future.result()


def team_size_function() -> int | None:
    """Return the address of a function for the threads of a run, or None without OpenMP.

    It returns the count of threads, 32 bits.
    """
    library = _library()
    return None if library is None else _address_of(library.omp_get_num_threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone, for operations that are shorter than a wake-up.

    Between two operations Python takes long enough for OpenMP's threads to fall asleep.
    """
    library = _library()
    if library is None:
        yield
        return
    count = library.omp_get_max_threads()
    try:
        library.omp_set_num_threads(1)
        yield
    finally:
        library.omp_set_num_threads(count)


@functools.cache
def give_way_function() -> int:
    """Return the address of a function that lets another thread have this core."""
    return _address_of(ctypes.CDLL(None).sched_yield)


def _address_of(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return torch with its OpenMP library. The threads of a second one would compete."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    names = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    name = next((name for name in names if Path(name).name.startswith("libtorch_cpu.")), None)
    if name is None:
        return None
    # Torch's own OpenMP is found among what it needs. SentencePiece brings another one along.
    library = ctypes.CDLL(name)
    if not all(hasattr(library, needed) for needed in _NEEDED):
        return None
    entry = library.GOMP_parallel
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return library


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")
