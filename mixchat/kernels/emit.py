"""A small language for writing vector code in Python, with values, pointers and loops.

The Python code runs once and writes instructions down. `a + b` writes an addition. The result is a
module of LLVM's intermediate representation. A function that doubles n numbers, 8 at a time:

    function = Function(module, "double", numbers=1)
    pointer, (n,) = function.pointer, function.numbers
    with function.loop(0, n, 8) as (place, _):
        pointer.store(pointer.load(vector(f32, 8), place * 4) * 2, place * 4)
    function.finish()

Offsets are in bytes. A Python number stands for a constant, in every place of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f32 = ir.FloatType()
void = ir.VoidType()
_byte_pointer = i8.as_pointer()
_CACHE_LINE = 64  # bytes


def vector(element: Any, count: int) -> Any:
    """Return the type of `count` numbers side by side."""
    return ir.VectorType(element, count)


class Value:
    """A number, or a vector of numbers, in a function that is being written."""

    def __init__(self, function: Function, raw: Any) -> None:
        self._function, self._builder, self.raw = function, function.builder, raw

    @property
    def type(self) -> Any:
        return self.raw.type

    @property
    def _is_float(self) -> bool:
        return bool(getattr(self.type, "element", self.type) == f32)

    def _binary(self, other: Value | float, integer: str, real: str | None = None) -> Value:
        operation = real if self._is_float else integer
        assert operation is not None
        right = self._function.constant(self.type, other)
        return self._wrap(getattr(self._builder, operation)(self.raw, right.raw))

    def _wrap(self, raw: Any) -> Value:
        return Value(self._function, raw)

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "", "fdiv")

    def __floordiv__(self, other: Value | int) -> Value:
        """Divide unsigned integers."""
        return self._binary(other, "udiv")

    def __mod__(self, other: Value | int) -> Value:
        """Take the remainder of unsigned integers."""
        return self._binary(other, "urem")

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and_")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or_")

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary(other, "shl")

    def __rshift__(self, other: Value | int) -> Value:
        """Shift in zeros from the left."""
        return self._binary(other, "lshr")

    def __neg__(self) -> Value:
        return self * -1

    def compare(self, operator: str, other: Value | float) -> Value:
        """Return a bit, or a vector of bits, by an operator like <= or ==. Integers are signed."""
        right = self._function.constant(self.type, other).raw
        if self._is_float:
            return self._wrap(self._builder.fcmp_ordered(operator, self.raw, right))
        return self._wrap(self._builder.icmp_signed(operator, self.raw, right))

    def choose(self, yes: Value, no: Value | float) -> Value:
        other = self._function.constant(yes.type, no)
        return self._wrap(self._builder.select(self.raw, yes.raw, other.raw))

    def bits_as(self, kind: Any) -> Value:
        return self._wrap(self._builder.bitcast(self.raw, kind))

    def widened(self, kind: Any) -> Value:
        """Return unsigned integers in more bits."""
        return self._wrap(self._builder.zext(self.raw, kind))

    def sign_extended(self, kind: Any) -> Value:
        """Return signed integers in more bits."""
        return self._wrap(self._builder.sext(self.raw, kind))

    def narrowed(self, kind: Any) -> Value:
        return self._wrap(self._builder.trunc(self.raw, kind))

    def as_float(self, kind: Any) -> Value:
        """Convert signed integers to floats."""
        return self._wrap(self._builder.sitofp(self.raw, kind))

    def as_integer(self, kind: Any) -> Value:
        """Convert floats to signed integers, rounded towards 0."""
        return self._wrap(self._builder.fptosi(self.raw, kind))

    def arithmetic_shift(self, bits: int) -> Value:
        """Shift to the right, with copies of the sign bit from the left."""
        return self._binary(bits, "ashr")

    def broadcast(self, count: int) -> Value:
        kind = vector(self.type, count)
        first = self._builder.insert_element(ir.Constant(kind, ir.Undefined), self.raw, i32(0))
        return self._wrap(first).shuffled([0] * count)

    def shuffled(self, places: Sequence[int], other: Value | None = None) -> Value:
        """Return the elements at these places of this vector followed by `other`."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.raw
        mask = ir.Constant(vector(i32, len(places)), list(places))
        return self._wrap(self._builder.shuffle_vector(self.raw, second, mask))

    def half(self, number: int) -> Value:
        """Return the first half of a vector, or the second one."""
        count = self.type.count // 2
        return self.shuffled([*range(number * count, (number + 1) * count)])

    def every_second(self, first: int) -> Value:
        """Return the elements at the even places of a vector, or at the odd ones."""
        return self.shuffled([*range(first, self.type.count, 2)])


def _suffix(kind: Any) -> str:
    return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"


class Pointer:
    """The address of a byte."""

    def __init__(self, function: Function, raw: Any) -> None:
        self._function, self._builder, self.raw = function, function.builder, raw

    def plus(self, offset: Value | int) -> Pointer:
        moved = self._builder.gep(self.raw, [self._function.constant(i64, offset).raw])
        return Pointer(self._function, moved)

    def load(self, kind: Any, offset: Value | int = 0) -> Value:
        """Load a value, aligned or not."""
        address = self._builder.bitcast(self.plus(offset).raw, kind.as_pointer())
        return Value(self._function, self._builder.load(address, align=1))

    def store(self, value: Value, offset: Value | int = 0) -> None:
        """Store a value, aligned or not."""
        address = self._builder.bitcast(self.plus(offset).raw, value.type.as_pointer())
        self._builder.store(value.raw, address, align=1)

    def prefetch(self, offset: Value | int, *, once: bool = False) -> None:
        """Prefetch the line into the first cache. The address need not exist.

        A line that is read `once` need not go to the other caches.
        """
        numbers = 0, 0 if once else 3, 1
        read, keep, data = (self._function.constant(i32, number) for number in numbers)
        self._function.call("llvm.prefetch.p0", void, self.plus(offset), read, keep, data)

    def take_next(self, order: str = "monotonic") -> Value:
        """Add one to the 64-bit number there, atomically. Return the old number.

        With the order "acq_rel" the threads that added before have published all that they stored.
        """
        added = self._builder.atomic_rmw("add", self._number, i64(1), order)
        return Value(self._function, added)

    def publish(self, number: Value) -> None:
        """Store a 64-bit number, and all that was stored before it, for other threads."""
        self._builder.store_atomic(number.raw, self._number, "release", align=8)

    def published(self) -> Value:
        """Load a number that another thread may publish."""
        return Value(self._function, self._builder.load_atomic(self._number, "acquire", align=8))

    @property
    def _number(self) -> Any:
        return self._builder.bitcast(self.raw, i64.as_pointer())


class Function:
    """A function that is being written. It takes a pointer and `numbers` 64-bit integers."""

    def __init__(self, module: Any, name: str, numbers: int = 0) -> None:
        kind = ir.FunctionType(void, [_byte_pointer] + [i64] * numbers)
        self.raw = ir.Function(module, kind, name)
        # A vector on the stack that is in two cache lines takes longer to load.
        self.raw.attributes.add("nounwind")  # llvmlite writes no alignment without an attribute
        self.raw.attributes.alignstack = _CACHE_LINE
        self._module = module
        self.builder = ir.IRBuilder(self.raw.append_basic_block())
        pointer, *rest = self.raw.args
        self.pointer = Pointer(self, pointer)
        self.numbers = [Value(self, number) for number in rest]

    def constant(self, kind: Any, number: Value | float | Sequence[int]) -> Value:
        """Return the number as a constant of this type, or a `Value` as it is."""
        if isinstance(number, Value):
            return number
        if not isinstance(kind, ir.VectorType):
            return Value(self, kind(number))
        numbers = number if isinstance(number, Sequence) else [number] * kind.count
        return Value(self, ir.Constant(kind, [kind.element(one) for one in numbers]))

    def address(self, number: Value) -> Pointer:
        return Pointer(self, self.builder.inttoptr(number.raw, _byte_pointer))

    def call(self, name: str, returns: Any, *arguments: Value | Pointer) -> Value:
        """Call one of LLVM's own functions."""
        raw = [argument.raw for argument in arguments]
        function = self._module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(returns, [argument.type for argument in raw])
            function = ir.Function(self._module, kind, name)
        return Value(self, self.builder.call(function, raw))

    def call_by_parts(self, name: str, size: int, *vectors: Value) -> Value:
        """Call one of LLVM's own functions for each `size` bytes of vectors, and join the results.

        They have the type of the first vector.
        """
        kind = vectors[0].type
        if kind.count * kind.element.width == 8 * size:
            return self.call(name, kind, *vectors)
        parts = [
            self.call_by_parts(name, size, *(one.half(number) for one in vectors))
            for number in (0, 1)
        ]
        return parts[0].shuffled([*range(kind.count)], parts[1])

    def maximum(self, one: Value, other: Value) -> Value:
        """Take the larger numbers, place by place. Integers are signed."""
        return one.compare(">", other).choose(one, other)

    def minimum(self, one: Value, other: Value) -> Value:
        """Take the smaller numbers, place by place. Integers are signed."""
        return one.compare("<", other).choose(one, other)

    def multiply_add(self, one: Value, other: Value, third: Value) -> Value:
        """Return one * other + third of floats, rounded once."""
        return self.call(f"llvm.fma.{_suffix(one.type)}", one.type, one, other, third)

    def total(self, value: Value) -> Value:
        """Add up a vector of floats, from the first to the last."""
        name = f"llvm.vector.reduce.fadd.{_suffix(value.type)}"
        return self.call(name, f32, self.constant(f32, 0.0), value)

    def rounded(self, value: Value) -> Value:
        """Round floats to the nearest integers, as floats."""
        return self.call(f"llvm.rint.{_suffix(value.type)}", value.type, value)

    def scratch(self, size: int) -> Pointer:
        """Reserve `size` bytes on the stack."""
        kind = ir.ArrayType(i8, size)
        with self.builder.goto_entry_block():
            space = self.builder.alloca(kind)
            space.align = _CACHE_LINE
        return Pointer(self, self.builder.bitcast(space, _byte_pointer))

    def call_own(self, other: Function, pointer: Pointer, *numbers: Value) -> None:
        """Call a function of the same module."""
        self.builder.call(other.raw, [pointer.raw, *(number.raw for number in numbers)])

    def call_address(self, address: Value, returns: Any, *pointers: Pointer) -> Value:
        kind = ir.FunctionType(returns, [_byte_pointer] * len(pointers)).as_pointer()
        function = self.builder.inttoptr(address.raw, kind)
        return Value(self, self.builder.call(function, [pointer.raw for pointer in pointers]))

    @contextmanager
    def loop(
        self, start: Value | int, end: Value | int, step: int, carried: Sequence[Value] = ()
    ) -> Iterator[tuple[Value, list[Value]]]:
        """Loop over what is written inside, as Python does over range(start, end, step).

        Yields the counter, and a list of the carried values. Each turn replaces its elements. After
        the loop it holds the last ones.
        """
        builder = self.builder
        first, last = self.constant(i64, start).raw, self.constant(i64, end).raw
        before = builder.block
        head, body, after = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        counter = builder.phi(i64)
        counter.add_incoming(first, before)
        turning = [builder.phi(value.type) for value in carried]
        for phi, value in zip(turning, carried, strict=True):
            phi.add_incoming(value.raw, before)
        builder.cbranch(builder.icmp_signed("<", counter, last), body, after)
        builder.position_at_end(body)
        values = [Value(self, phi) for phi in turning]
        yield Value(self, counter), values
        counter.add_incoming(builder.add(counter, i64(step)), builder.block)
        for phi, value in zip(turning, values, strict=True):
            phi.add_incoming(value.raw, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        values[:] = [Value(self, phi) for phi in turning]

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run what is written inside only if the condition is true."""
        with self.builder.if_then(condition.raw):
            yield

    @contextmanager
    def each_item(self, counter: Pointer, count: Value) -> Iterator[Value]:
        """Run what is written inside once for each item of work, a number below `count`.

        Each of the threads that run this function takes the next free one.
        """
        builder = self.builder
        head, body, after = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        item = counter.take_next()
        builder.cbranch(item.compare("<", count).raw, body, after)
        builder.position_at_end(body)
        yield item
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def wait(self, number: Pointer, least: Value) -> Iterator[Value]:
        """Wait until another thread publishes a number that is not below `least`.

        What is written inside runs again and again until then. Yields the count of runs before.
        """
        builder, before = self.builder, self.builder.block
        head, body, after = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        turn = builder.phi(i64)
        turn.add_incoming(i64(0), before)
        builder.cbranch(number.published().compare("<", least).raw, body, after)
        builder.position_at_end(body)
        yield Value(self, turn)
        turn.add_incoming(builder.add(turn, i64(1)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def finish(self) -> None:
        self.builder.ret_void()
