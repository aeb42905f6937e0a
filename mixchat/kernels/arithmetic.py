"""Functions of numbers, or vectors of them, that no single instruction computes."""

from __future__ import annotations

from typing import Any, Literal

from mixchat.kernels.emit import Function, Pointer, Value, f32, i16, i32, vector

_LOG2_E = 1.4426950408889634
_LEAST = -126.0  # the exponent of the least normal float
# The Taylor series of 2^x, for x from -1/2 to 1/2. The next term would be 2e-8 of the result.
_SERIES = (1.0, 0.6931471806, 0.2402265070, 0.0555041087, 0.0096181291, 0.0013333558, 0.0001540353)


def exponential(function: Function, x: Value) -> Value:
    """Return e^x for floats x <= 0, with a relative error of 3e-7, and 0 below e^-87."""
    integers = _as_many(i32, x)
    power = x * _LOG2_E
    is_normal = power.compare(">", _LEAST)
    power = is_normal.choose(power, _LEAST)
    whole = function.rounded(power)
    rest = power - whole
    result = function.constant(x.type, _SERIES[-1])
    for factor in reversed(_SERIES[:-1]):
        result = function.multiply_add(result, rest, function.constant(x.type, factor))
    # To multiply a float by 2^n, n is added to its exponent, which begins at bit 23.
    bits = result.bits_as(integers) + (whole.as_integer(integers) << 23)
    return is_normal.choose(bits.bits_as(x.type), 0.0)


def sigmoid(function: Function, x: Value) -> Value:
    """Return 1 / (1 + e^-x), by powers of e that are at most 1."""
    is_positive = x.compare(">", 0.0)
    power = exponential(function, is_positive.choose(-x, x))
    one = function.constant(x.type, 1.0)
    return is_positive.choose(one, power) / (power + 1.0)


def as_fp32(pointer: Pointer, place: Value, bf16: bool, count: int | None = None) -> Value:
    """Load number `place` of a tensor in bf16 or fp32, or `count` numbers from there."""
    short, integer, real = (
        kind if count is None else vector(kind, count) for kind in (i16, i32, f32)
    )
    if not bf16:
        return pointer.load(real, place * 4)
    return (pointer.load(short, place * 2).widened(integer) << 16).bits_as(real)


def store_fp32(pointer: Pointer, value: Value, place: Value, bf16: bool) -> None:
    """Store fp32 numbers from number `place` of a tensor in bf16 or fp32 on."""
    if bf16:
        pointer.store(rounded_to_bf16(value), place * 2)
    else:
        pointer.store(value, place * 4)


def rounded_to_bf16(value: Value) -> Value:
    """Round fp32 to the nearest bf16, ties to even, and return its bits (i16). NaN stays NaN."""
    bits = value.bits_as(_as_many(i32, value))
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    is_number = (bits & 0x7FFFFFFF).compare("<=", 0x7F800000)
    return (is_number.choose(rounded, 0x7FC00000) >> 16).narrowed(_as_many(i16, value))


def reduced(function: Function, value: Value, how: Literal["fadd", "fmax"]) -> Value:
    """Return the sum or maximum of a vector by halves. `Function.total` rounds sums differently."""
    count = value.type.count
    while count > 1:
        count //= 2
        other = value.shuffled([*range(count, 2 * count)])
        value = value.shuffled([*range(count)])
        value = value + other if how == "fadd" else function.maximum(value, other)
    return Value(function, function.builder.extract_element(value.raw, i32(0)))


def _as_many(element: Any, value: Value) -> Any:
    count = getattr(value.type, "count", None)
    return element if count is None else vector(element, count)
