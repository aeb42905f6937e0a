"""The operations on a token's row between the matrices, each in one pass over the row.

torch takes four to nine operations for what is one here, and 20 us in place of 2. The kernels
compute in fp32 and round once. Functions fall back to torch if their kernel does not take the rows.

T = tokens, D = columns, K = experts of a token, h = head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

import torch
from llvmlite import ir
from torch.nn import functional

from mixchat.base.model_config import HiddenAct
from mixchat.kernels.cpu.arithmetic import (
    as_fp32,
    rounded,
    sigmoid,
    softcapped,
    softplus,
    store_fp32,
)
from mixchat.kernels.cpu.compile import LANES, compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i64, vector
from mixchat.kernels.cpu.program import Argument, Signature, Step

_TWICE_ROOT = 1.5957691216057308  # 2 * sqrt(2 / pi)
_DTYPES = (torch.float32, torch.bfloat16)
# Numbers that one thread finishes before a second one has started.
_FEW = 2**16
_PART, _MAX_PARTS = 16, 64  # columns of which a part is a multiple, and parts of a row
_SIGNATURE = Signature(
    "x",
    "weight",
    "cos",
    "sin",
    "out",
    "tokens",
    "columns",
    "stride",
    "count",
    "eps",
    "limit",
    "alpha",
    "rotated",
    "places",
    "out_stride",
)


def can_compute(dtype: torch.dtype, columns: int, device_type: str = "cpu") -> bool:
    """Return whether the kernels take rows of `columns` numbers of this type."""
    instructions = instruction_set()
    if device_type != "cpu" or instructions is None or dtype not in _DTYPES:
        return False
    return columns % LANES[instructions] == 0


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [T, D] / rms(x), rounded to the type of x, times weight [D].

    Or of x [T, heads, D]. A weight in fp32 multiplies before the quotient is rounded. `out` is as
    in `rms_norm_step`.
    """
    if not can_compute(x.dtype, x.shape[-1], x.device.type):
        wide = x.float()
        mean = (wide * wide).mean(-1, keepdim=True)
        normed = (wide * torch.rsqrt(mean + eps)).to(weight.dtype) * weight
        normed = normed.to(x.dtype)
        return normed if out is None else out.copy_(normed)
    if out is None:
        x = x.contiguous()
        out = torch.empty_like(x)
    rms_norm_step(x, weight, eps, out).run()
    return out


def rms_norm_step(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> Step:
    """Return `rms_norm` as a step.

    The numbers of a token follow one another in x and in `out`, which may be x.
    """
    return _step(
        "rms_norm" if weight.dtype == x.dtype else "unrounded_rms_norm",
        x,
        out,
        weight=weight,
        columns=x.shape[-1],
        count=x.shape[1] if x.dim() == 3 else 1,
        stride=x.stride(0),
        out_stride=out.stride(0),
        eps=float(eps),
    )


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Return tanh(x / cap) * cap, [T, D]."""
    if not can_compute(x.dtype, x.shape[-1], x.device.type):
        return (torch.tanh(x.float() / cap) * cap).to(x.dtype)
    # Threads share tokens, so a long row is taken as several.
    parts = max(gcd(x.shape[-1], _PART * _MAX_PARTS) // _PART, 1)
    rows = x.contiguous().view(x.shape[0] * parts, -1)
    out = torch.empty_like(rows)
    _step("softcap", rows, out, columns=rows.shape[-1], limit=float(cap)).run()
    return out.view(x.shape)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [T, heads, h] times cos [T, h], plus x with its halves swapped times sin [T, h].

    The numbers of a token's heads follow one another. If cos and sin have fewer columns than x, the
    other columns of x stay as they are.
    """
    (tokens, heads, width), rotated = x.shape, cos.shape[-1]
    parts = rotated // 2, width - rotated
    if not all(can_compute(x.dtype, columns, x.device.type) for columns in parts):
        turned = x[..., :rotated]
        kept = x[..., rotated:]
        swapped = turned.roll(rotated // 2, dims=-1)
        return torch.cat((turned * cos[:, None] + swapped * sin[:, None], kept), dim=-1)
    out = torch.empty(tokens, heads, width, dtype=x.dtype)
    step = rotate_step(x, out, rotated)
    step.set(cos=cos.data_ptr(), sin=sin.data_ptr())
    step.run()
    return out


def rotate_step(x: torch.Tensor, out: torch.Tensor, rotated: int) -> Step:
    """Return `rotate` of the first `rotated` columns as a step. `cos` and `sin` are not set yet.

    The heads of `out` may be parts of longer rows.
    """
    return _step(
        "rotate",
        x,
        out,
        columns=x.shape[2],
        count=x.shape[1],
        stride=x.stride(0),
        out_stride=out.stride(1),
        rotated=rotated,
    )


class RowKernel(Protocol):
    """Makes one row of a token's rows, for any tokens, or as a step for contiguous rows."""

    def __call__(self, *operands: Any, **options: Any) -> torch.Tensor:
        """Return the rows [T, D] for operands [T, ...]."""

    def step(self, *operands: Any, **options: Any) -> Step:
        """Return `__call__` as a step. `out` follows the operands."""


@dataclass(frozen=True)
class Swiglu:
    """The product of gate and up, after silu(x) = x * sigmoid(x) of the gate, or GELU by tanh.

    With a limit it is (up + 1) * gate * sigmoid(alpha * gate). Up is clamped to the limit on both
    sides, and gate above.
    """

    limit: float | None = None
    alpha: float = 1.702
    act: HiddenAct = "silu"

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the product [T, D] for gate and up, [T, 2 * D]."""
        columns = gate_up.shape[-1] // 2
        if not can_compute(gate_up.dtype, columns, gate_up.device.type):
            return self._by_torch(*gate_up.chunk(2, dim=-1))
        gate_up = gate_up.contiguous()
        out = torch.empty(gate_up.shape[0], columns, dtype=gate_up.dtype)
        self.step(gate_up, out).run()
        return out

    def _by_torch(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.act == "gelu_pytorch_tanh":
            return functional.gelu(gate, approximate="tanh") * up
        if self.limit is None:
            return functional.silu(gate) * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def step(self, gate_up: torch.Tensor, out: torch.Tensor) -> Step:
        """Return `__call__` as a step, for contiguous tensors."""
        if self.limit is None:
            name = "swiglu" if self.act == "silu" else "geglu"
            return _step(name, gate_up, out, columns=out.shape[-1])
        numbers = {"limit": float(self.limit), "alpha": float(self.alpha)}
        return _step("limited_swiglu", gate_up, out, columns=out.shape[-1], **numbers)


@dataclass(frozen=True)
class Gating:
    """x times sigmoid(gate)."""

    def __call__(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the product for x and gate, [T, D]."""
        if not can_compute(x.dtype, x.shape[-1], x.device.type):
            return (x.float() * torch.sigmoid(gate.float())).to(x.dtype)
        x = x.contiguous()
        out = torch.empty_like(x)
        self.step(x, gate, out).run()
        return out

    def step(self, x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> Step:
        """Return `__call__` as a step. The numbers of a token's gate follow one another."""
        return _step("gate", x, out, weight=gate, columns=x.shape[-1], stride=gate.stride(0))


@dataclass(frozen=True)
class HeadGating:
    """Each head of x, of `width` columns, times softplus(gate), ln(1 + e^gate)."""

    width: int

    def __call__(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the product for x [T, H * h] and gate [T, H]."""
        if not can_compute(x.dtype, self.width, x.device.type):
            factors = functional.softplus(gate.float()).unsqueeze(-1)
            heads = x.reshape(len(x), -1, self.width)
            return (heads.float() * factors).to(x.dtype).flatten(1)
        x = x.contiguous()
        out = torch.empty_like(x)
        self.step(x, gate, out).run()
        return out

    def step(self, x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> Step:
        """Return `__call__` as a step. The numbers of a token's gate follow one another."""
        sizes = {"columns": self.width, "count": gate.shape[-1]}
        return _step("head_gate", x, out, weight=gate, stride=gate.stride(0), **sizes)


@dataclass(frozen=True)
class Weighting:
    """x [T, D] times a weight of each token, fp32 [T, 1]."""

    def __call__(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weighted_sum(x.unsqueeze(1), weights)

    def step(self, x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> Step:
        return weighted_sum_step(x, weights, out)


@dataclass(frozen=True)
class Addition:
    """The sum of two rows [T, D]."""

    def __call__(self, x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return x + addend

    def step(self, x: torch.Tensor, addend: torch.Tensor, out: torch.Tensor) -> Step:
        return _step("add", x, out, weight=addend, columns=x.shape[-1])


@dataclass(frozen=True)
class Scaling:
    """x [T, D] times a number. The step works in place."""

    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def step(self, x: torch.Tensor, out: torch.Tensor) -> Step:
        return _step("scale", x, out, columns=x.shape[-1], alpha=float(self.factor))


@dataclass(frozen=True)
class Clamping:
    """x [T, D] between -limit and limit. The step works in place."""

    limit: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-self.limit, self.limit)

    def step(self, x: torch.Tensor, out: torch.Tensor) -> Step:
        return _step("clamp", x, out, columns=x.shape[-1], limit=float(self.limit))


def weighted_sum(
    x: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum [T, D] of x [T, K, D] times its weights [T, K], fp32.

    `places` [T, K], int64, choose rows of x [n, D] instead.
    """
    if not can_compute(x.dtype, x.shape[-1], x.device.type):
        wide = (x if places is None else x[places]).float()
        return (wide * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
    x = x.contiguous()
    weights = weights.contiguous()
    out = torch.empty(weights.shape[0], x.shape[-1], dtype=x.dtype)
    weighted_sum_step(x, weights, out, places).run()
    return out


def weighted_sum_step(
    x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, places: torch.Tensor | None = None
) -> Step:
    """Return `weighted_sum` as a step, for contiguous tensors."""
    if places is None:
        places = torch.arange(weights.numel())
    numbers = {"columns": x.shape[-1], "count": weights.shape[1]}
    return _step("weighted_sum", x, out, weight=weights, places=places, **numbers)


def copy_step(x: torch.Tensor, out: torch.Tensor) -> Step:
    """Return a step that copies rows x [T, D] to `out`. Both may be parts of longer rows."""
    columns = x.shape[1]
    return _step("copy", x, out, columns=columns, stride=x.stride(0), out_stride=out.stride(0))


def _step(name: str, x: torch.Tensor, out: torch.Tensor, **arguments: Argument) -> Step:
    function = _compiled(out.dtype == torch.bfloat16).function(name)
    threads = 1 if out.numel() <= _FEW else None
    return _SIGNATURE.step(function, threads, x=x, out=out, tokens=out.shape[0], **arguments)


@compiled_here
def _compiled(module: ir.Module, lanes: int, bf16: bool) -> None:
    norms = (_RMSNormWriter, _UnroundedRMSNormWriter)
    products = (_SwigluWriter, _LimitedSwiglu, _Geglu, _Gate)
    operations = (
        *norms,
        *products,
        _HeadGate,
        _Clamp,
        _Scale,
        _Softcap,
        _RotationWriter,
        _WeightedSum,
        _Add,
        _Copy,
    )
    for operation in operations:
        operation(module, lanes, bf16).write()


class _RowWriter(ABC):
    """A function that computes row after row. An item of work is a token."""

    name: str

    def __init__(self, module: ir.Module, lanes: int, bf16: bool) -> None:
        self.function = Function(module, self.name)
        self.lanes = lanes
        self._bf16 = bf16
        args = self.args = _SIGNATURE.read_by(self.function)
        self.x = args.pointer("x")
        self.out = args.pointer("out")
        self.columns = args.number("columns")

    def write(self) -> None:
        with self.function.each_item(self.function.pointer, self.args.number("tokens")) as token:
            self.row(token)
        self.function.finish()

    @abstractmethod
    def row(self, token: Value) -> None: ...

    def load(self, pointer: Pointer, index: Value) -> Value:
        return as_fp32(pointer, index, self._bf16, self.lanes)

    def store(self, value: Value, index: Value) -> None:
        store_fp32(self.out, value, index, self._bf16)

    @property
    def zeros(self) -> Value:
        return self.function.constant(vector(f32, self.lanes), 0.0)


class _RMSNormWriter(_RowWriter):
    name = "rms_norm"

    def row(self, token: Value) -> None:
        function = self.function
        args = self.args
        lanes = self.lanes
        with function.loop(0, args.number("count"), 1) as (head, _):
            first = token * args.number("stride") + head * self.columns
            target = token * args.number("out_stride") + head * self.columns
            with function.loop(0, self.columns, lanes, [self.zeros]) as (column, sums):
                numbers = self.load(self.x, first + column)
                sums[0] = function.multiply_add(numbers, numbers, sums[0])
            mean = function.total(sums[0]) / self.columns.as_float(f32) + args.load("eps", f32)
            root = function.call("llvm.sqrt.f32", f32, mean)
            factor = (function.constant(f32, 1.0) / root).broadcast(lanes)
            with function.loop(0, self.columns, lanes) as (column, _):
                normed = self.load(self.x, first + column) * factor
                self.store(self.weighted(normed, column), target + column)

    def weighted(self, normed: Value, column: Value) -> Value:
        # Transformers' norms round here, before they multiply with the weight.
        return rounded(normed, self._bf16) * self.load(self.args.pointer("weight"), column)


class _UnroundedRMSNormWriter(_RMSNormWriter):
    name = "unrounded_rms_norm"  # of which the weights are in fp32

    def weighted(self, normed: Value, column: Value) -> Value:
        weight = self.args.pointer("weight")
        return normed * as_fp32(weight, column, bf16=False, count=self.lanes)


class _Clamp(_RowWriter):
    name = "clamp"

    def row(self, token: Value) -> None:
        limit = self.args.load("limit", f32).broadcast(self.lanes)
        with self.function.loop(0, self.columns, self.lanes) as (column, _):
            index = token * self.columns + column
            # `minimum` and `maximum` return their second operand if one is NaN, so NaN stays NaN.
            number = self.function.minimum(limit, self.load(self.x, index))
            self.store(self.function.maximum(-limit, number), index)


class _Scale(_RowWriter):
    name = "scale"

    def row(self, token: Value) -> None:
        factor = self.args.load("alpha", f32).broadcast(self.lanes)
        with self.function.loop(0, self.columns, self.lanes) as (column, _):
            index = token * self.columns + column
            self.store(self.load(self.x, index) * factor, index)


class _Softcap(_RowWriter):
    name = "softcap"

    def row(self, token: Value) -> None:
        cap = self.args.load("limit", f32).broadcast(self.lanes)
        with self.function.loop(0, self.columns, self.lanes) as (column, _):
            index = token * self.columns + column
            number = self.load(self.x, index)
            self.store(softcapped(self.function, number, cap), index)


class _RotationWriter(_RowWriter):
    name = "rotate"

    def row(self, token: Value) -> None:
        function = self.function
        args = self.args
        width = self.columns
        heads = args.number("count")
        rotated = args.number("rotated")
        half = rotated // 2
        cos = args.pointer("cos")
        sin = args.pointer("sin")
        with function.loop(0, heads, 1) as (head, _):
            source = token * args.number("stride") + head * width
            target = (token * heads + head) * args.number("out_stride")
            with function.loop(0, half, self.lanes) as (column, _):
                low, high = (self.load(self.x, source + at) for at in (column, column + half))
                for at, number, partner in ((column, low, high), (column + half, high, low)):
                    angle = token * rotated + at
                    swapped = partner * self.load(sin, angle)
                    turned = function.multiply_add(number, self.load(cos, angle), swapped)
                    self.store(turned, target + at)
            with function.loop(rotated, width, self.lanes) as (column, _):
                self.store(self.load(self.x, source + column), target + column)


class _SwigluWriter(_RowWriter):
    name = "swiglu"

    def row(self, token: Value) -> None:
        function = self.function
        columns = self.columns
        with function.loop(0, columns, self.lanes) as (column, _):
            index = token * columns + column
            gate = self.load(self.x, index + token * columns)
            up = self.load(self.x, index + (token + 1) * columns)
            self.store(self.product(gate, up), index)

    def product(self, gate: Value, up: Value) -> Value:
        return gate * sigmoid(self.function, gate) * up


class _Geglu(_SwigluWriter):
    name = "geglu"

    def product(self, gate: Value, up: Value) -> Value:
        # (1 + tanh(y)) / 2 is sigmoid(2 * y).
        inner = (gate * gate * gate * 0.044715 + gate) * _TWICE_ROOT
        return gate * sigmoid(self.function, inner) * up


class _LimitedSwiglu(_SwigluWriter):
    name = "limited_swiglu"

    def product(self, gate: Value, up: Value) -> Value:
        function = self.function
        limit, alpha = (
            self.args.load(name, f32).broadcast(self.lanes) for name in ("limit", "alpha")
        )
        # In this order NaN stays NaN, as in `_Clamp`.
        gate = function.minimum(limit, gate)
        up = function.maximum(-limit, function.minimum(limit, up))
        return gate * sigmoid(function, gate * alpha) * (up + 1.0)


class _Gate(_RowWriter):
    name = "gate"

    def row(self, token: Value) -> None:
        function = self.function
        gates = self.args.pointer("weight")
        first = token * self.args.number("stride")
        with function.loop(0, self.columns, self.lanes) as (column, _):
            index = token * self.columns + column
            gate = self.load(gates, first + column)
            self.store(self.load(self.x, index) * _sigmoid(function, gate), index)


class _HeadGate(_RowWriter):
    name = "head_gate"

    def row(self, token: Value) -> None:
        function = self.function
        heads = self.args.number("count")
        gates = self.args.pointer("weight")
        with function.loop(0, heads, 1) as (head, _):
            gate = as_fp32(gates, token * self.args.number("stride") + head, self._bf16)
            # NaN stays NaN, so that a broken token is noticed.
            factor = gate.compare("==", gate).choose(softplus(function, gate), gate)
            first = (token * heads + head) * self.columns
            with function.loop(first, first + self.columns, self.lanes) as (index, _):
                self.store(self.load(self.x, index) * factor.broadcast(self.lanes), index)


def _sigmoid(function: Function, x: Value) -> Value:
    """Return sigmoid(x). NaN stays NaN, so that a broken token is noticed."""
    return x.compare("==", x).choose(sigmoid(function, x), x)


class _WeightedSum(_RowWriter):
    name = "weighted_sum"

    def row(self, token: Value) -> None:
        function = self.function
        count = self.args.number("count")
        weights = self.args.pointer("weight")
        places = self.args.pointer("places")
        with function.loop(0, self.columns, self.lanes) as (column, _):
            with function.loop(0, count, 1, [self.zeros]) as (choice, sums):
                number = token * count + choice
                weight = weights.load(f32, number * 4).broadcast(self.lanes)
                row = places.load(i64, number * 8)
                numbers = self.load(self.x, row * self.columns + column)
                sums[0] = function.multiply_add(numbers, weight, sums[0])
            self.store(sums[0], token * self.columns + column)


class _Add(_RowWriter):
    name = "add"

    def row(self, token: Value) -> None:
        addend = self.args.pointer("weight")
        with self.function.loop(0, self.columns, self.lanes) as (column, _):
            index = token * self.columns + column
            self.store(self.load(self.x, index) + self.load(addend, index), index)


class _Copy(_RowWriter):
    name = "copy"

    def row(self, token: Value) -> None:
        source = token * self.args.number("stride")
        target = token * self.args.number("out_stride")
        with self.function.loop(0, self.columns, self.lanes) as (column, _):
            self.store(self.load(self.x, source + column), target + column)
