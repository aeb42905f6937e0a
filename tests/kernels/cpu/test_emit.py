"""The language in which kernels are written, run on this CPU."""

import ctypes
from collections.abc import Callable

import pytest
from llvmlite import ir

from mixchat.kernels.cpu.compile import compile_module, instruction_set
from mixchat.kernels.cpu.emit import Function, f32, i32, i64, vector

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")


def run(write: Callable[[Function], None], *numbers: int, threads: int = 1) -> list[int]:
    """Write a function, run it on an array of 64-bit numbers, and give back the array."""
    module = ir.Module("test")
    function = Function(module, "tested")
    write(function)
    function.finish()
    arguments = (ctypes.c_int64 * len(numbers))(*numbers)
    compiled = compile_module(lambda: str(module), instruction_set() or "avx2", str(module))
    compiled.function("tested").run(arguments, threads)
    return list(arguments)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda a, b: a + b, 23),
        (lambda a, b: a - b, 17),
        (lambda a, b: a * b, 60),
        (lambda a, b: a // b, 6),
        (lambda a, b: a % b, 2),
        (lambda a, b: a & b, 0),
        (lambda a, b: a | b, 23),
        (lambda a, b: a << 2, 80),
        (lambda a, b: a >> 2, 5),
        (lambda a, b: a + 1, 21),
        (lambda a, b: (b - a).narrowed(i32).sign_extended(i64), -17),
        (lambda a, b: a.compare("<", b).choose(a, b), 3),
    ],
)
def test_operators_are_those_of_python(operation, expected):
    def write(function: Function) -> None:
        a, b = (function.pointer.load(i64, 8 * place) for place in (0, 1))
        function.pointer.store(operation(a, b), 0)

    assert run(write, 20, 3)[0] == expected


def test_the_stack_of_a_function_begins_at_a_cache_line():
    # llvmlite leaves it out, without a word, for functions that have no attribute.
    module = ir.Module("test")
    Function(module, "tested").finish()
    assert "alignstack(64)" in str(module)


@pytest.mark.parametrize(("start", "end", "step"), [(0, 10, 1), (3, 20, 4), (5, 5, 1), (7, 2, 1)])
def test_a_loop_runs_as_range_does_and_carries_values(start, end, step):
    def write(function: Function) -> None:
        last = function.pointer.load(i64)
        zero = function.constant(i64, 0)
        with function.loop(start, last, step, [zero, zero]) as (number, carried):
            carried[0] = carried[0] + number
            carried[1] = carried[1] + 1
        function.pointer.store(carried[0], 0)
        function.pointer.store(carried[1], 8)

    numbers = range(start, end, step)
    assert run(write, end, 0) == [sum(numbers), len(numbers)]


@pytest.mark.parametrize("bit", [0, 1])
def test_a_condition_decides_what_happens(bit):
    def write(function: Function) -> None:
        with function.when(function.pointer.load(i64).compare("==", 1)):
            function.pointer.store(function.constant(i64, 7), 8)

    assert run(write, bit, 5)[1] == (7 if bit else 5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_items_between_them(threads):
    """Each item is a byte that is counted up: all are one afterwards, none is done twice."""

    def write(function: Function) -> None:
        with function.each_item(function.pointer, function.pointer.load(i64, 8)) as item:
            place = item * 8 + 16
            function.pointer.store(function.pointer.load(i64, place) + 1, place)

    count = 1000
    assert run(write, 0, count, *[0] * count, threads=threads)[2:] == [1] * count


def test_vectors_are_spread_picked_and_converted():
    def write(function: Function) -> None:
        pair = function.pointer.load(vector(i32, 2))  # the halves of the first number
        swapped = pair.shuffled([1, 0])
        function.pointer.store(swapped, 8)
        function.pointer.store(pair.shuffled([0, 2], swapped).widened(vector(i64, 2)), 16)
        floats = function.constant(vector(f32, 2), [1.5, -2.5]) * 2.0
        function.pointer.store(floats.as_integer(vector(i32, 2)), 32)
        function.pointer.store(function.constant(i32, 9).broadcast(2), 40)

    low, high = 3, 4
    both = run(write, low | high << 32, 0, 0, 0, 0, 0)
    assert both[1] == high | low << 32
    assert both[2:4] == [low, high]
    assert [both[4] & 0xFFFFFFFF, both[4] >> 32] == [3, -5]
    assert both[5] == 9 | 9 << 32


def test_a_function_calls_another_of_its_module():
    def write(function: Function) -> None:
        other = Function(function.raw.module, "other", numbers=1)
        other.pointer.store(other.numbers[0] * 2, 8)
        other.finish()
        function.call_own(other, function.pointer, function.pointer.load(i64))

    assert run(write, 21, 0) == [21, 42]
