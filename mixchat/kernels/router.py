"""The choice of a router: the best experts of each token, and the softmax over their logits.

T = tokens, D = columns, E = experts, K = experts of a token.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir

from mixchat.kernels.arithmetic import as_fp32, exponential
from mixchat.kernels.compile import LANES, Compiled, InstructionSet, compile_module, instruction_set
from mixchat.kernels.emit import Function, Value, f32, i64, vector
from mixchat.kernels.signature import Signature

_MOST = 1024  # experts: their logits are on the stack
_FEW = 4  # tokens that one thread is done with before a second one has begun
# What is chosen is not chosen again: all others are above `_START`, however low their logits are.
# What is no number is above all that are, as torch has it.
_CHOSEN, _START, _LOWEST, _NO_NUMBER = -3.4e38, -3.3e38, -3.2e38, 3.4e38
_SIGNATURE = Signature(
    "x", "gate", "logits", "experts", "weights", "tokens", "columns", "count", "kept"
)


def computes(x: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether `route` can be used for these."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    instructions = instruction_set()
    experts, columns = gate.shape
    return instructions is not None and columns % LANES[instructions] == 0 and experts <= _MOST


def route(x: torch.Tensor, gate: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts [T, K], int64, whose logits x gate^T are largest, and the softmax over these.

    x [T, D]; gate [E, D], fp32, as all that is computed. The weights [T, K] are fp32. Of equal
    logits the first is better.
    """
    x, tokens = x.contiguous(), x.shape[0]
    experts = torch.empty(tokens, kept, dtype=torch.int64)
    weights, logits = torch.empty(tokens, kept), torch.empty(tokens, gate.shape[0])
    numbers = _SIGNATURE.numbers(
        x=x.data_ptr(),
        gate=gate.data_ptr(),
        logits=logits.data_ptr(),
        experts=experts.data_ptr(),
        weights=weights.data_ptr(),
        tokens=tokens,
        columns=x.shape[1],
        count=gate.shape[0],
        kept=kept,
    )
    compiled = _compiled(instruction_set(), x.dtype == torch.bfloat16)
    compiled.function("route").run(numbers, 1 if tokens <= _FEW else torch.get_num_threads())
    return experts, weights


@functools.cache
def _compiled(instructions: InstructionSet | None, bf16: bool) -> Compiled:
    """The function for x in bf16 (`bf16`) or fp32."""
    assert instructions is not None
    module = ir.Module("router")
    _Route(module, LANES[instructions], bf16).write()
    return compile_module(module, instructions)


class _Route:
    """A token is an item of work."""

    def __init__(self, module: ir.Module, lanes: int, bf16: bool) -> None:
        self._function, self._lanes, self._bf16 = Function(module, "route"), lanes, bf16
        self._given = _SIGNATURE.read_by(self._function)
        self._ranks = self._function.scratch(_MOST * 4)

    def write(self) -> None:
        function, given = self._function, self._given
        count, kept = given.number("count"), given.number("kept")
        with function.each_item(function.pointer, given.number("tokens")) as token:
            with function.loop(0, count, 1) as (expert, _):
                logit = self._logit(token, expert)
                given.pointer("logits").store(logit, (token * count + expert) * 4)
                self._ranks.store(self._rank(logit), expert * 4)
            first = token * kept
            with function.loop(first, first + kept, 1) as (place, _):
                self._choose(token, place, count)
            self._soften(first, kept)
        function.finish()

    def _logit(self, token: Value, expert: Value) -> Value:
        function, given, lanes = self._function, self._given, self._lanes
        columns, zeros = given.number("columns"), function.constant(vector(f32, lanes), 0.0)
        with function.loop(0, columns, lanes, [zeros]) as (column, sums):
            x = as_fp32(given.pointer("x"), token * columns + column, self._bf16, lanes)
            row = given.pointer("gate").load(x.type, (expert * columns + column) * 4)
            sums[0] = function.multiply_add(x, row, sums[0])
        return function.total(sums[0])

    def _rank(self, logit: Value) -> Value:
        """By what an expert is chosen: its logit, or a number in place of what is none."""
        finite = self._function.maximum(logit, self._function.constant(f32, _LOWEST))
        return logit.compare("==", logit).choose(finite, _NO_NUMBER)

    def _choose(self, token: Value, place: Value, count: Value) -> None:
        """Put the best that is left down, with its logit in place of its weight."""
        function, given = self._function, self._given
        start = [function.constant(i64, 0), function.constant(f32, _START)]
        with function.loop(0, count, 1, start) as (expert, best):
            rank = self._ranks.load(f32, expert * 4)
            is_better = rank.compare(">", best[1])
            best[:] = is_better.choose(expert, best[0]), is_better.choose(rank, best[1])
        chosen = best[0]
        self._ranks.store(function.constant(f32, _CHOSEN), chosen * 4)
        logit = given.pointer("logits").load(f32, (token * count + chosen) * 4)
        given.pointer("experts").store(chosen, place * 8)
        given.pointer("weights").store(logit, place * 4)

    def _soften(self, first: Value, kept: Value) -> None:
        """From logits to weights; the first is the largest."""
        function, weights = self._function, self._given.pointer("weights")
        largest = weights.load(f32, first * 4)
        zero = function.constant(f32, 0.0)
        with function.loop(first, first + kept, 1, [zero]) as (place, sums):
            below = weights.load(f32, place * 4) - largest
            power = exponential(function, below)
            power = below.compare("==", below).choose(power, below)  # what is no number stays none
            weights.store(power, place * 4)
            sums[0] = sums[0] + power
        with function.loop(first, first + kept, 1) as (place, _):
            weights.store(weights.load(f32, place * 4) / sums[0], place * 4)
