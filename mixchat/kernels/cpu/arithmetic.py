"""Functions of numbers, or vectors of them, that no single instruction computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i16, i32, vector

_LOG2_E = 1.4426950408889634
_LEAST = -126.0  # the exponent of the least normal float
# The Taylor series of 2^x, for x from -1/2 to 1/2. The next term would be 2e-8 of the result.
_SERIES = (1.0, 0.6931471806, 0.2402265070, 0.0555041087, 0.0096181291, 0.0013333558, 0.0001540353)
# The series of 2 artanh(s) / s in powers of s^2, for s up to 1/3. The next term would be 1e-9.
_LOG_SERIES = tuple(2.0 / (2 * number + 1) for number in range(8))


def exponential(function: Function, x: Value) -> Value:
    """Return e^x for floats x <= 0, with a relative error of 3e-7, and 0 below e^-87."""
    integers = _as_many(i32, x)
    power = x * _LOG2_E
    is_normal = power.compare(">", _LEAST)
    power = is_normal.choose(power, _LEAST)
    # e^x = 2^whole * 2^fraction, with a fraction from -1/2 to 1/2.
    whole = function.rounded(power)
    fraction = power - whole
    result = function.constant(x.type, _SERIES[-1])
    for factor in reversed(_SERIES[:-1]):
        result = function.multiply_add(result, fraction, function.constant(x.type, factor))
    # To multiply a float by 2^n, n is added to its exponent, which begins at bit 23.
    bits = result.bits_as(integers) + (whole.as_integer(integers) << 23)
    return is_normal.choose(bits.bits_as(x.type), 0.0)


def sigmoid(function: Function, x: Value) -> Value:
    """Return 1 / (1 + e^-x), by powers of e that are at most 1."""
    is_positive = x.compare(">", 0.0)
    power = exponential(function, is_positive.choose(-x, x))
    numerator = is_positive.choose(function.constant(x.type, 1.0), power)
    return numerator / (power + 1.0)


def softcapped(function: Function, x: Value, cap: Value) -> Value:
    """Return tanh(x / cap) * cap. NaN stays NaN."""
    # tanh(x) is 2 * sigmoid(2 * x) - 1.
    score = sigmoid(function, (x + x) / cap)
    return x.compare("==", x).choose((score + score - 1.0) * cap, x)


def softplus(function: Function, x: Value) -> Value:
    """Return ln(1 + e^x) of floats, with a relative error of 5e-7, and 0 below -87."""
    is_positive = x.compare(">", 0.0)
    power = exponential(function, is_positive.choose(-x, x))
    # ln(1 + p) = 2 artanh(p / (2 + p)), which is exact for small p, too.
    ratio = power / (power + 2.0)
    square = ratio * ratio
    series = function.constant(x.type, _LOG_SERIES[-1])
    for factor in reversed(_LOG_SERIES[:-1]):
        series = function.multiply_add(series, square, function.constant(x.type, factor))
    return function.maximum(x, function.constant(x.type, 0.0)) + ratio * series


def as_fp32(pointer: Pointer, index: Value, bf16: bool, count: int | None = None) -> Value:
    """Load number `index` of a tensor in bf16 or fp32, or `count` numbers from there."""
    short, integer, real = (
        element if count is None else vector(element, count) for element in (i16, i32, f32)
    )
    if not bf16:
        return pointer.load(real, index * 4)
    # bf16 is the upper half of fp32, so two instructions convert it on any CPU.
    return (pointer.load(short, index * 2).widened(integer) << 16).bits_as(real)


def store_fp32(pointer: Pointer, value: Value, index: Value, bf16: bool) -> None:
    """Store fp32 numbers from number `index` of a tensor in bf16 or fp32 on."""
    if bf16:
        pointer.store(rounded_to_bf16(value), index * 2)
    else:
        pointer.store(value, index * 4)


def rounded_to_bf16(value: Value) -> Value:
    """Round fp32 to the nearest bf16, ties to even, and return its bits (i16). NaN stays NaN."""
    # Adding just below half of the last place carries if the rest is above half, or at half and
    # the last bit is odd. NaN would carry into the sign, and so is replaced.
    bits = value.bits_as(_as_many(i32, value))
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    is_number = (bits & 0x7FFFFFFF).compare("<=", 0x7F800000)
    return (is_number.choose(rounded, 0x7FC00000) >> 16).narrowed(_as_many(i16, value))


def rounded(value: Value, bf16: bool) -> Value:
    """Round fp32 numbers to the type of a tensor, and return to fp32."""
    if not bf16:
        return value
    whole = rounded_to_bf16(value).widened(_as_many(i32, value))
    return (whole << 16).bits_as(value.type)


def reduced(function: Function, value: Value, how: Literal["fadd", "fmax"]) -> Value:
    """Return the sum or maximum of a vector by halves. `Function.total` rounds sums differently."""
    # By halves it takes log2(count) steps that wait for each other, from first to last count steps.
    count = value.type.count
    while count > 1:
        count //= 2
        high = value.half(1)
        low = value.half(0)
        value = low + high if how == "fadd" else function.maximum(low, high)
    return Value(function, function.builder.extract_element(value.raw, i32(0)))


def totals(function: Function, vectors: Sequence[Value]) -> Value:
    """Return the sum of each of 2^n vectors, by halves. Their lanes are at least as many."""
    lanes = vectors[0].type.count
    while lanes > 1:
        half = lanes // 2
        size = vectors[0].type.count
        # Two vectors become one, whose halves are theirs, as long as there are two.
        are_pairs = len(vectors) > 1
        firsts = range(0, 2 * size if are_pairs else size, lanes)
        low = [first + lane for first in firsts for lane in range(half)]
        high = [lane + half for lane in low]
        seconds = vectors[1::2] if are_pairs else [None]
        vectors = [
            first.shuffled(low, second) + first.shuffled(high, second)
            for first, second in zip(vectors[::2], seconds, strict=True)
        ]
        lanes = half
    return vectors[0]


def _as_many(element: Any, value: Value) -> Any:
    count = getattr(value.type, "count", None)
    return element if count is None else vector(element, count)
