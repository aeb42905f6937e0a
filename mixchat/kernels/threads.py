"""Runs a compiled function on several cores at once, on torch's threads."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_NEEDED = ("GOMP_parallel", "GOMP_barrier", "omp_get_num_threads")


class NativeFunction:
    """A compiled function, which takes a pointer. The code lives as long as `owner`."""

    def __init__(self, address: int, owner: object) -> None:
        self._address, self._owner = address, owner
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    @property
    def address(self) -> int:
        return self._address

    def run(self, arguments: ctypes.Array[ctypes.c_int64], threads: int) -> None:
        """Call it from `threads` threads with the address of `arguments`. Wait for all of them."""
        where = ctypes.addressof(arguments)
        if threads == 1:
            self._call(where)
            return
        library = _library()
        if library is not None:
            library.GOMP_parallel(self._address, where, threads, 0)
            return
        others = [_pool(threads - 1).submit(self._call, where) for _ in range(threads - 1)]
        self._call(where)
        for other in others:
            other.result()


def team_functions() -> tuple[int, int] | None:
    """Return the addresses of two functions for the threads of a run, or None without OpenMP.

    The first one is a barrier. The second one returns the count of threads, 32 bits.
    """
    library = _library()
    if library is None:
        return None
    functions = library.GOMP_barrier, library.omp_get_num_threads
    barrier, count = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return barrier, count


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch has loaded. A second one's threads would compete."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    names = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line}
    for name in sorted(names):
        if Path(name).name.startswith(("libgomp", "libiomp", "libomp")):
            library = ctypes.CDLL(name)
            if all(hasattr(library, name) for name in _NEEDED):
                entry = library.GOMP_parallel
                entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                entry.restype = None
                return library
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")
