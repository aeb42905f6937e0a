"""The arguments of a kernel: one array of 64-bit numbers, written by Python, read by the code."""

from __future__ import annotations

import ctypes
from typing import Any

from mixchat.kernels.emit import Function, Pointer, Value, i64

Numbers = ctypes.Array[ctypes.c_int64]


class Signature:
    """The names of the arguments, in their order. The first counts the items that are taken."""

    def __init__(self, *names: str) -> None:
        self._places = {name: place for place, name in enumerate(("next", *names))}
        self._array: type[Numbers] = ctypes.c_int64 * len(self._places)

    def numbers(self, **given: int) -> Numbers:
        """The array with these arguments; the others are 0."""
        array = self._array()
        for name, number in given.items():
            array[self._places[name]] = number
        return array

    def read_by(self, function: Function) -> Arguments:
        """The arguments as the function sees them."""
        return Arguments(function, self._places)


class Arguments:
    """The arguments of a function that is being written."""

    def __init__(self, function: Function, places: dict[str, int]) -> None:
        self.function, self._places = function, places

    def load(self, name: str, kind: Any) -> Value:
        """One of another type than a number of 64 bits, in the lowest of them."""
        return self.function.pointer.load(kind, 8 * self._places[name])

    def number(self, name: str) -> Value:
        """A number of 64 bits."""
        return self.load(name, i64)

    def pointer(self, name: str) -> Pointer:
        """An address."""
        return self.function.address(self.number(name))
