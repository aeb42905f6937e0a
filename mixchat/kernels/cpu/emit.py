"""A small language for writing vector code in Python, with values, pointers and loops.

The Python code runs once and writes instructions down. `a + b` writes an addition. The result is a
module of LLVM's intermediate representation. A function that doubles n numbers, 8 at a time:

    function = Function(module, "double", numbers=1)
    pointer, (n,) = function.pointer, function.numbers
    with function.loop(0, n, 8) as (index, _):
        pointer.store(pointer.load(vector(f32, 8), index * 4) * 2, index * 4)
    function.finish()

Offsets are in bytes. A Python number stands for a constant, in every lane of a vector.
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
_CACHE_LINE_BYTES = 64


def vector(element: Any, count: int) -> Any:
    """Return the type of `count` numbers side by side."""
    return ir.VectorType(element, count)


class Value:
    """A number, or a vector of numbers, in a function that is being written."""

    def __init__(self, function: Function, raw: Any) -> None:
        self._function = function
        self._builder = function.builder
        self.raw = raw

    @property
    def type(self) -> Any:
        return self.raw.type

    @property
    def _is_float(self) -> bool:
        return bool(getattr(self.type, "element", self.type) == f32)

    def _binary(self, rhs: Value | float, integer: str, real: str | None = None) -> Value:
        operation = real if self._is_float else integer
        assert operation is not None
        operand = self._function.constant(self.type, rhs)
        return self._wrap(getattr(self._builder, operation)(self.raw, operand.raw))

    def _wrap(self, raw: Any) -> Value:
        return Value(self._function, raw)

    def __add__(self, rhs: Value | float) -> Value:
        return self._binary(rhs, "add", "fadd")

    def __sub__(self, rhs: Value | float) -> Value:
        return self._binary(rhs, "sub", "fsub")

    def __mul__(self, rhs: Value | float) -> Value:
        return self._binary(rhs, "mul", "fmul")

    def __truediv__(self, rhs: Value | float) -> Value:
        return self._binary(rhs, "", "fdiv")

    def __floordiv__(self, rhs: Value | int) -> Value:
        """Divide unsigned integers."""
        return self._binary(rhs, "udiv")

    def __mod__(self, rhs: Value | int) -> Value:
        """Take the remainder of unsigned integers."""
        return self._binary(rhs, "urem")

    def __and__(self, rhs: Value | int) -> Value:
        return self._binary(rhs, "and_")

    def __or__(self, rhs: Value | int) -> Value:
        return self._binary(rhs, "or_")

    def __xor__(self, rhs: Value | int) -> Value:
        return self._binary(rhs, "xor")

    def __lshift__(self, rhs: Value | int) -> Value:
        return self._binary(rhs, "shl")

    def __rshift__(self, rhs: Value | int) -> Value:
        """Shift in zeros from the left."""
        return self._binary(rhs, "lshr")

    def __neg__(self) -> Value:
        return self * -1

    def compare(self, operator: str, rhs: Value | float) -> Value:
        """Return a bit, or a vector of bits, by an operator like <= or ==. Integers are signed."""
        operand = self._function.constant(self.type, rhs).raw
        if self._is_float:
            return self._wrap(self._builder.fcmp_ordered(operator, self.raw, operand))
        return self._wrap(self._builder.icmp_signed(operator, self.raw, operand))

    def choose(self, yes: Value, no: Value | float) -> Value:
        if_false = self._function.constant(yes.type, no)
        return self._wrap(self._builder.select(self.raw, yes.raw, if_false.raw))

    def bits_as(self, result_type: Any) -> Value:
        return self._wrap(self._builder.bitcast(self.raw, result_type))

    def widened(self, result_type: Any) -> Value:
        """Return unsigned integers in more bits."""
        return self._wrap(self._builder.zext(self.raw, result_type))

    def sign_extended(self, result_type: Any) -> Value:
        """Return signed integers in more bits."""
        return self._wrap(self._builder.sext(self.raw, result_type))

    def narrowed(self, result_type: Any) -> Value:
        return self._wrap(self._builder.trunc(self.raw, result_type))

    def as_float(self, result_type: Any) -> Value:
        """Convert signed integers to floats."""
        return self._wrap(self._builder.sitofp(self.raw, result_type))

    def as_integer(self, result_type: Any) -> Value:
        """Convert floats to signed integers, rounded towards 0."""
        return self._wrap(self._builder.fptosi(self.raw, result_type))

    def arithmetic_shift(self, bits: int) -> Value:
        """Shift to the right, with copies of the sign bit from the left."""
        return self._binary(bits, "ashr")

    def broadcast(self, count: int) -> Value:
        # LLVM has no instruction that broadcasts. It recognizes this pair and emits the CPU's own.
        undefined = ir.Constant(vector(self.type, count), ir.Undefined)
        lane_0 = self._builder.insert_element(undefined, self.raw, i32(0))
        return self._wrap(lane_0).shuffled([0] * count)

    def shuffled(self, lanes: Sequence[int], second: Value | None = None) -> Value:
        """Return these lanes of this vector followed by `second`."""
        rhs = ir.Constant(self.type, ir.Undefined) if second is None else second.raw
        mask = ir.Constant(vector(i32, len(lanes)), list(lanes))
        return self._wrap(self._builder.shuffle_vector(self.raw, rhs, mask))

    def hidden(self) -> Value:
        """Return a vector of x86 that LLVM takes for any vector, although it may be a constant.

        LLVM replaces instructions whose operand is a constant, not always by faster ones.
        """
        assembly = ir.InlineAsm(ir.FunctionType(self.type, [self.type]), "", "=v,0")
        return self._wrap(self._builder.call(assembly, [self.raw]))

    def half(self, number: int) -> Value:
        """Return the first half of a vector, or the second one."""
        count = self.type.count // 2
        return self.shuffled([*range(number * count, (number + 1) * count)])

    def every_second(self, first: int) -> Value:
        """Return the even lanes of a vector for `first` 0, the odd lanes for 1."""
        return self.shuffled([*range(first, self.type.count, 2)])


def _suffix(value_type: Any) -> str:
    return f"v{value_type.count}f32" if isinstance(value_type, ir.VectorType) else "f32"


class Pointer:
    """The address of a byte."""

    def __init__(self, function: Function, raw: Any) -> None:
        self._function = function
        self._builder = function.builder
        self.raw = raw

    def plus(self, offset: Value | int) -> Pointer:
        moved = self._builder.gep(self.raw, [self._function.constant(i64, offset).raw])
        return Pointer(self._function, moved)

    def load(self, value_type: Any, offset: Value | int = 0) -> Value:
        """Load a value, aligned or not."""
        # With align=1 LLVM emits movups, which is as fast as movaps within a cache line.
        address = self._builder.bitcast(self.plus(offset).raw, value_type.as_pointer())
        return Value(self._function, self._builder.load(address, align=1))

    def store(self, value: Value, offset: Value | int = 0) -> None:
        """Store a value, aligned or not."""
        address = self._builder.bitcast(self.plus(offset).raw, value.type.as_pointer())
        self._builder.store(value.raw, address, align=1)

    def store_past_caches(self, value: Value, offset: Value | int = 0) -> None:
        """Store a vector of floats that is not read again soon, at a multiple of its size."""
        # A plain store reads the line from memory before it writes.
        address = self._builder.bitcast(self.plus(offset).raw, value.type.as_pointer())
        store = self._builder.store(value.raw, address, align=value.type.count * 4)
        store.set_metadata("nontemporal", self._builder.module.add_metadata([i32(1)]))

    def prefetch(self, offset: Value | int, *, second: bool = False) -> None:
        """Prefetch the line into all caches, or all but the first. The address need not exist."""
        # LLVM's flags: a read and not a write, locality 2 (prefetcht1) or 3 (prefetcht0), data.
        # With locality 0 (prefetchnta) an Intel Xeon loses lines before they are read: Mixtral's
        # decode had half the throughput there. A Zen 4 has the same with both.
        numbers = 0, 2 if second else 3, 1
        flags = [self._function.constant(i32, number) for number in numbers]
        self._function.call("llvm.prefetch.p0", void, self.plus(offset), *flags)

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
        function_type = ir.FunctionType(void, [_byte_pointer] + [i64] * numbers)
        self.raw = ir.Function(module, function_type, name)
        # A vector on the stack that is in two cache lines takes longer to load.
        self.raw.attributes.add("nounwind")  # llvmlite writes no alignment without an attribute
        self.raw.attributes.alignstack = _CACHE_LINE_BYTES
        self._module = module
        self.builder = ir.IRBuilder(self.raw.append_basic_block())
        pointer, *integers = self.raw.args
        self.pointer = Pointer(self, pointer)
        self.numbers = [Value(self, integer) for integer in integers]

    def constant(self, value_type: Any, number: Value | float | Sequence[int]) -> Value:
        """Return the number as a constant of this type, or a `Value` as it is."""
        if isinstance(number, Value):
            return number
        if not isinstance(value_type, ir.VectorType):
            return Value(self, value_type(number))
        numbers = number if isinstance(number, Sequence) else [number] * value_type.count
        elements = [value_type.element(element) for element in numbers]
        return Value(self, ir.Constant(value_type, elements))

    def address(self, number: Value) -> Pointer:
        return Pointer(self, self.builder.inttoptr(number.raw, _byte_pointer))

    def call(self, name: str, returns: Any, *arguments: Value | Pointer) -> Value:
        """Call one of LLVM's own functions."""
        raw = [argument.raw for argument in arguments]
        function = self._module.globals.get(name)
        if function is None:
            function_type = ir.FunctionType(returns, [argument.type for argument in raw])
            function = ir.Function(self._module, function_type, name)
        return Value(self, self.builder.call(function, raw))

    def call_by_parts(self, name: str, size: int, *operands: Value) -> Value:
        """Call one of LLVM's own functions for each `size` bytes of vectors, and join the results.

        They have the type of the first vector.
        """
        result_type = operands[0].type
        if result_type.count * result_type.element.width == 8 * size:
            return self.call(name, result_type, *operands)
        low, high = (
            self.call_by_parts(name, size, *(operand.half(number) for operand in operands))
            for number in (0, 1)
        )
        return low.shuffled([*range(result_type.count)], high)

    # fcmp with select is one instruction on x86, maxps, which returns `rhs` if a number is NaN.
    # LLVM's maxnum ignores NaN, which takes three.
    def maximum(self, lhs: Value, rhs: Value) -> Value:
        """Take the larger numbers, lane by lane. Integers are signed."""
        return lhs.compare(">", rhs).choose(lhs, rhs)

    def minimum(self, lhs: Value, rhs: Value) -> Value:
        """Take the smaller numbers, lane by lane. Integers are signed."""
        return lhs.compare("<", rhs).choose(lhs, rhs)

    def multiply_add(self, lhs: Value, rhs: Value, addend: Value) -> Value:
        """Return lhs * rhs + addend of floats, rounded once."""
        return self.call(f"llvm.fma.{_suffix(lhs.type)}", lhs.type, lhs, rhs, addend)

    def total(self, value: Value) -> Value:
        """Add up a vector of floats, from the first to the last."""
        name = f"llvm.vector.reduce.fadd.{_suffix(value.type)}"
        return self.call(name, f32, self.constant(f32, 0.0), value)

    def rounded(self, value: Value) -> Value:
        """Round floats to the nearest integers, as floats."""
        return self.call(f"llvm.rint.{_suffix(value.type)}", value.type, value)

    def scratch(self, size: int) -> Pointer:
        """Reserve `size` bytes on the stack."""
        # In the entry block, because an alloca within a loop takes new bytes in each turn.
        with self.builder.goto_entry_block():
            space = self.builder.alloca(ir.ArrayType(i8, size))
            space.align = _CACHE_LINE_BYTES
        return Pointer(self, self.builder.bitcast(space, _byte_pointer))

    def call_own(self, callee: Function, pointer: Pointer, *numbers: Value) -> None:
        """Call a function of the same module."""
        self.builder.call(callee.raw, [pointer.raw, *(number.raw for number in numbers)])

    def call_address(self, address: Value, returns: Any, *pointers: Pointer) -> Value:
        function_type = ir.FunctionType(returns, [_byte_pointer] * len(pointers))
        function = self.builder.inttoptr(address.raw, function_type.as_pointer())
        return Value(self, self.builder.call(function, [pointer.raw for pointer in pointers]))

    @contextmanager
    def loop(
        self, start: Value | int, end: Value | int, step: int, carried: Sequence[Value] = ()
    ) -> Iterator[tuple[Value, list[Value]]]:
        """Loop over what is written inside, as Python does over range(start, end, step).

        Yields the counter, and a list of the carried values. What is written inside replaces its
        elements, by which the next turn starts. After the loop the list holds the last values.
        """
        builder = self.builder
        # The blocks have LLVM's names. A phi takes the value of the block that was left last.
        first = self.constant(i64, start).raw
        last = self.constant(i64, end).raw
        preheader = builder.block
        header, body, exit_block = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(header)
        builder.position_at_end(header)
        counter = builder.phi(i64)
        counter.add_incoming(first, preheader)
        phis = [builder.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value.raw, preheader)
        builder.cbranch(builder.icmp_signed("<", counter, last), body, exit_block)
        builder.position_at_end(body)
        values = [Value(self, phi) for phi in phis]
        yield Value(self, counter), values
        counter.add_incoming(builder.add(counter, i64(step)), builder.block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value.raw, builder.block)
        builder.branch(header)
        builder.position_at_end(exit_block)
        values[:] = [Value(self, phi) for phi in phis]

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run what is written inside only if the condition is true."""
        with self.builder.if_then(condition.raw):
            yield

    @contextmanager
    def each_item(self, counter: Pointer, count: Value) -> Iterator[Value]:
        """Run what is written inside once for each item of work, a number below `count`.

        Each of the threads that run this function takes the next free item.
        """
        builder = self.builder
        header, body, exit_block = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(header)
        builder.position_at_end(header)
        item = counter.take_next()
        builder.cbranch(item.compare("<", count).raw, body, exit_block)
        builder.position_at_end(body)
        yield item
        builder.branch(header)
        builder.position_at_end(exit_block)

    @contextmanager
    def wait(self, number: Pointer, least: Value) -> Iterator[Value]:
        """Wait until another thread publishes a number that is not below `least`.

        What is written inside runs again and again until then. Yields how often it has run.
        """
        builder = self.builder
        preheader = self.builder.block
        header, body, exit_block = (self.raw.append_basic_block() for _ in range(3))
        builder.branch(header)
        builder.position_at_end(header)
        runs = builder.phi(i64)
        runs.add_incoming(i64(0), preheader)
        builder.cbranch(number.published().compare("<", least).raw, body, exit_block)
        builder.position_at_end(body)
        yield Value(self, runs)
        runs.add_incoming(builder.add(runs, i64(1)), builder.block)
        builder.branch(header)
        builder.position_at_end(exit_block)

    def finish(self) -> None:
        self.builder.ret_void()
