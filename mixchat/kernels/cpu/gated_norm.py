"""The norm of a DeltaNet's or Mamba2's output, which has a gate.

T = tokens, v = the width of a head or group.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.arithmetic import as_fp32, reduced, rounded, sigmoid, store_fp32
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.convolution import silu
from mixchat.kernels.cpu.emit import Function, Value, f32, vector
from mixchat.kernels.cpu.program import Signature, Step

_FEW = 2**16  # numbers that one thread finishes before a second one has started
_SIGNATURE = Signature("x", "gate", "weight", "out", "stride", "tokens", "heads", "width", "eps")


class GatedNorm:
    """The RMSNorm of each head, times the weight [v] and silu of a gate.

    In Mamba2 x is multiplied by silu of the gate first. Then each group is normalized and has its
    own part of the weight [groups * v]. groups: None for a DeltaNet.
    """

    def __init__(self, weight: torch.Tensor, eps: float, groups: int | None = None) -> None:
        self.weight = weight
        self.eps = eps
        self._gates_first = groups is not None
        self.width = weight.shape[0] // (groups or 1)

    def __call__(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the product for x and gate, [T, heads * v], in their type."""
        width = self.width
        if not rows.can_compute(x.dtype, width, x.device.type):
            if self._gates_first:
                product = (x.float() * silu(gate.float())).view(x.shape[0], -1, width)
                mean = (product * product).mean(-1, keepdim=True)
                product = (product * torch.rsqrt(mean + self.eps)).view(x.shape)
                return product.to(x.dtype) * self.weight
            normed = rows.rms_norm(x.view(x.shape[0], -1, width), self.weight, self.eps)
            gates = silu(gate.float()).view(normed.shape)
            return (normed * gates).to(x.dtype).view(x.shape)
        out = torch.empty_like(x)
        self.step(x, gate, out).run()
        return out

    def step(self, x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> Step:
        """Return `__call__` as a step. x and out are contiguous. `gate` has rows of a matrix."""
        compiled = _compiled(x.dtype == torch.bfloat16, self._gates_first)
        return _SIGNATURE.step(
            compiled.function("gated_norm"),
            threads=1 if x.numel() <= _FEW else None,
            x=x,
            gate=gate,
            weight=self.weight,
            out=out,
            stride=gate.stride(0),
            tokens=x.shape[0],
            heads=x.shape[1] // self.width,
            width=self.width,
            eps=float(self.eps),
        )


@compiled_here
def _compiled(module: ir.Module, lanes: int, bf16: bool, gates_first: bool) -> None:
    _GatedNormWriter(module, lanes, bf16, gates_first).write()


class _GatedNormWriter:
    """The function `gated_norm`. An item of work is a token. It rounds where transformers does."""

    def __init__(self, module: ir.Module, lanes: int, bf16: bool, gates_first: bool) -> None:
        self._function = Function(module, "gated_norm")
        self._lanes = lanes
        self._bf16 = bf16
        self._gates_first = gates_first
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        heads = args.number("heads")
        width = args.number("width")
        with (
            function.each_item(function.pointer, args.number("tokens")) as token,
            function.loop(0, heads, 1) as (head, _),
        ):
            first = (token * heads + head) * width
            gate = token * args.number("stride") + head * width
            self._head(first, gate, head * width if self._gates_first else head * 0, width)
        function.finish()

    def _head(self, first: Value, gate: Value, weight: Value, width: Value) -> None:
        function = self._function
        args = self._args
        lanes = self._lanes
        bf16 = self._bf16
        zeros = function.constant(vector(f32, lanes), 0.0)
        with function.loop(0, width, lanes, [zeros]) as (column, sums):
            numbers = self._numbers(first + column, gate + column)
            sums[0] = function.multiply_add(numbers, numbers, sums[0])
        mean = reduced(function, sums[0], "fadd") / width.as_float(f32) + args.load("eps", f32)
        root = function.call("llvm.sqrt.f32", f32, mean)
        factor = (function.constant(f32, 1.0) / root).broadcast(lanes)
        with function.loop(0, width, lanes) as (column, _):
            numbers = self._numbers(first + column, gate + column)
            weights = as_fp32(args.pointer("weight"), weight + column, bf16, lanes)
            normed = rounded(rounded(numbers * factor, bf16) * weights, bf16)
            if not self._gates_first:
                normed = normed * self._silu(gate + column)
            store_fp32(args.pointer("out"), normed, first + column, bf16)

    def _numbers(self, index: Value, gate: Value) -> Value:
        """Return what is normalized."""
        numbers = as_fp32(self._args.pointer("x"), index, self._bf16, self._lanes)
        return numbers * self._silu(gate) if self._gates_first else numbers

    def _silu(self, gate: Value) -> Value:
        gates = as_fp32(self._args.pointer("gate"), gate, self._bf16, self._lanes)
        return gates * sigmoid(self._function, gates)
