"""The arguments of a kernel: an array of 64-bit numbers that Python writes and the kernel reads."""

from __future__ import annotations

import ctypes
from typing import Any

from mixchat.kernels.emit import Function, Pointer, Value, i64

Numbers = ctypes.Array[ctypes.c_int64]


def copy_of(numbers: Numbers) -> Numbers:
    """Return the same arguments in an array of their own."""
    return type(numbers).from_buffer_copy(numbers)


class Signature:
    """The names of a kernel's arguments, in their order.

    Before them comes the counter of `Function.each_item`, which starts at 0.
    """

    def __init__(self, *names: str) -> None:
        self._places = {name: place for place, name in enumerate(("next", *names))}
        self._array: type[Numbers] = ctypes.c_int64 * len(self._places)

    def numbers(self, **given: int) -> Numbers:
        """Return the array with these arguments; the others are 0."""
        array = self._array()
        self.set(array, **given)
        return array

    def set(self, numbers: Numbers, **given: int) -> None:
        """Replace some arguments."""
        for name, number in given.items():
            numbers[self._places[name]] = number

    def address(self, numbers: Numbers, name: str) -> int:
        """Return the address at which an argument lies."""
        return ctypes.addressof(numbers) + 8 * self._places[name]

    def read_by(self, function: Function) -> Arguments:
        """Return the arguments as the function reads them."""
        return Arguments(function, self._places)


class Arguments:
    """The arguments of a function that is being written."""

    def __init__(self, function: Function, places: dict[str, int]) -> None:
        self.function, self._places = function, places

    def load(self, name: str, kind: Any) -> Value:
        """Load an argument of this type, from the lowest of its 64 bits."""
        return self.function.pointer.load(kind, 8 * self._places[name])

    def number(self, name: str) -> Value:
        """Load a 64-bit number."""
        return self.load(name, i64)

    def pointer(self, name: str) -> Pointer:
        """Load an address."""
        return self.function.address(self.number(name))
