"""Short causal convolutions of each channel, which remember the last inputs.

T = tokens, C = channels, L = taps, the inputs of which one output is made.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.arithmetic import as_fp32, sigmoid, store_fp32
from mixchat.kernels.cpu.compile import LANES, compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, Value, f32, vector
from mixchat.kernels.cpu.program import Signature, Step

_FEW = 2**16  # numbers that one thread finishes before a second one has started
_VECTORS = 2  # of channels, in one item of work. Their inputs in bf16 are a line of the cache.
_SIGNATURE = Signature(
    *("x", "weight", "bias", "before", "after", "out"),
    *("tokens", "columns", "stride", "out_stride"),
)


class Convolution:
    """Sums up each channel's last L inputs, weighted, in fp32.

    weight: [C, L], the oldest input's first. bias: [C], which is added last. The inputs are x
    [T, C], and silu follows the sum. If the convolution is `gated`, x is [T, 3C] with the parts
    gate, output gate and inputs. The gate multiplies the inputs, and the output gate the sums.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
    ) -> None:
        self.weight, self.gated = weight.float().t().contiguous(), gated  # [L, C]
        self.bias = None if bias is None else bias.float().contiguous()

    @property
    def channels(self) -> int:
        """Return C."""
        return self.weight.shape[1]

    @property
    def state_shape(self) -> tuple[int, int]:
        """Return the shape of the state in fp32, the last L - 1 inputs, the oldest first."""
        taps, channels = self.weight.shape
        return taps - 1, channels

    def __call__(
        self,
        x: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the result [T, C], in fp32, or in the type of x if gated. `out` is used for it.

        x and `out` are rows of matrices. `before` is the state before these tokens. The state after
        them is written to `after`.
        """
        if out is None:
            out = x.new_empty(len(x), self.channels, dtype=x.dtype if self.gated else torch.float32)
        if not rows.can_compute(x.dtype, self.channels, x.device.type):
            return out.copy_(self._by_torch(x, before, after))
        step = self.step(x, out)
        step.set(before=before.data_ptr(), after=after.data_ptr())
        step.run()
        return out

    def _by_torch(self, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        parts = x.float().chunk(3, dim=1) if self.gated else ()
        inputs = torch.cat([before, parts[0] * parts[2] if parts else x.float()])
        sums = inputs[: x.shape[0]] * self.weight[0]
        for tap in range(1, self.weight.shape[0]):
            sums = sums + inputs[tap : tap + x.shape[0]] * self.weight[tap]
        if self.bias is not None:
            sums = sums + self.bias
        after.copy_(inputs[x.shape[0] :])
        return (sums * parts[1]).to(x.dtype) if parts else silu(sums)

    def step(self, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return `__call__` as a step. `before` and `after` are not set yet."""
        taps, channels = self.weight.shape
        lanes = LANES[instruction_set() or "avx2"]
        vectors = _VECTORS if channels % (_VECTORS * lanes) == 0 else 1
        has_bias = self.bias is not None
        compiled = _compiled(x.dtype == torch.bfloat16, taps, self.gated, vectors, has_bias)
        return _SIGNATURE.step(
            compiled.function("convolve"),
            threads=1 if out.numel() <= _FEW else None,
            x=x,
            weight=self.weight,
            bias=self.bias,
            out=out,
            tokens=x.shape[0],
            columns=channels,
            stride=x.stride(0),
            out_stride=out.stride(0),
        )


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(x), with bits that do not depend on the size of x, as torch's do."""
    return x / (1 + (-x).exp())


@compiled_here
def _compiled(
    module: ir.Module,
    lanes: int,
    bf16: bool,
    taps: int,
    gated: bool,
    vectors: int,
    has_bias: bool,
) -> None:
    (_Gated if gated else _Activated)(module, lanes, bf16, taps, vectors, has_bias).write()


class _Activated:
    """The function `convolve`. An item of work is some vectors of channels, for all tokens."""

    def __init__(
        self, module: ir.Module, lanes: int, bf16: bool, taps: int, vectors: int, has_bias: bool
    ) -> None:
        self.function = Function(module, "convolve")
        self._has_bias = has_bias
        self.lanes = lanes
        self.bf16 = bf16
        self._taps = taps
        self._vectors = vectors
        self._floats = vector(f32, lanes)
        args = self.args = _SIGNATURE.read_by(self.function)
        self.columns = args.number("columns")
        self.x = args.pointer("x")

    def write(self) -> None:
        function = self.function
        args = self.args
        wide = self.lanes * self._vectors
        with function.each_item(function.pointer, self.columns // wide) as item:
            channels = [item * wide + number * self.lanes for number in range(self._vectors)]
            weights = [self._rows("weight", self._taps, channel) for channel in channels]
            biases = [self._rows("bias", 1, channel) for channel in channels if self._has_bias]
            window = [self._rows("before", self._taps - 1, channel) for channel in channels]
            inputs = [value for values in window for value in values]
            with function.loop(0, args.number("tokens"), 1, inputs) as (token, carried):
                for number, channel in enumerate(channels):
                    at = number * (self._taps - 1)
                    last = [*carried[at : at + self._taps - 1], self.input(token, channel)]
                    carried[at : at + self._taps - 1] = last[1:]
                    total = last[0] * weights[number][0]
                    for value, weight in zip(last[1:], weights[number][1:], strict=True):
                        total = function.multiply_add(value, weight, total)
                    if self._has_bias:
                        total = total + biases[number][0]
                    self.finish(total, token, channel)
            for number, channel in enumerate(channels):
                for tap in range(self._taps - 1):
                    target = (self.columns * tap + channel) * 4
                    args.pointer("after").store(carried[number * (self._taps - 1) + tap], target)
        function.finish()

    def _rows(self, name: str, count: int, channel: Value) -> list[Value]:
        pointer = self.args.pointer(name)
        return [
            pointer.load(self._floats, (self.columns * row + channel) * 4) for row in range(count)
        ]

    def load(self, token: Value, column: Value) -> Value:
        index = token * self.args.number("stride") + column
        return as_fp32(self.x, index, self.bf16, self.lanes)

    def input(self, token: Value, channel: Value) -> Value:
        return self.load(token, channel)

    def finish(self, total: Value, token: Value, channel: Value) -> None:
        result = total * sigmoid(self.function, total)
        self.args.pointer("out").store(
            result, (token * self.args.number("out_stride") + channel) * 4
        )


class _Gated(_Activated):
    """The function `convolve` with gates."""

    def input(self, token: Value, channel: Value) -> Value:
        return self.load(token, channel) * self.load(token, channel + self.columns * 2)

    def finish(self, total: Value, token: Value, channel: Value) -> None:
        result = total * self.load(token, channel + self.columns)
        store_fp32(
            self.args.pointer("out"),
            result,
            token * self.args.number("out_stride") + channel,
            self.bf16,
        )
