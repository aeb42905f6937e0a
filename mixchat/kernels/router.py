"""Chooses the best experts of each token, with the softmax over their logits.

T = tokens, D = columns, E = experts, K = experts of a token.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir
from torch.nn import functional

from mixchat.kernels import rows
from mixchat.kernels.arithmetic import as_fp32, exponential
from mixchat.kernels.compile import LANES, Compiled, InstructionSet, compile_module, instruction_set
from mixchat.kernels.emit import Function, Value, f32, i64, vector
from mixchat.kernels.program import Signature, Step

_MAX_EXPERTS = 1024  # because their logits are on the stack
_FEW = 4  # tokens that one thread finishes before a second one has started
# Experts that are left are above `_START`, however low their logits are. As in torch, NaN is above
# all numbers.
_CHOSEN, _START, _LOWEST, _NO_NUMBER = -3.4e38, -3.3e38, -3.2e38, 3.4e38
_SIGNATURE = Signature(
    "x", "gate", "logits", "experts", "weights", "tokens", "columns", "count", "choices"
)
_LOOK_UP = Signature("experts", "table", "targets", "choices", "columns")


def can_route(x: torch.Tensor, gate: torch.Tensor) -> bool:
    """Return whether the kernel takes these."""
    experts, columns = gate.shape
    return rows.can_compute(x.dtype, columns, x.device.type) and experts <= _MAX_EXPERTS


def route(x: torch.Tensor, gate: torch.Tensor, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts [T, K], int64, with the largest logits, and their softmax [T, K], fp32.

    The logits are x [T, D] times gate [E, D], in fp32, because rounding them could change the
    choice. Of equal logits the kernel takes the first.
    """
    if not can_route(x, gate):
        router_logits = functional.linear(x.float(), gate)  # [T, E]
        largest, selected = router_logits.topk(choices, dim=-1)
        return selected, largest.softmax(dim=-1)
    x, tokens = x.contiguous(), x.shape[0]
    experts = torch.empty(tokens, choices, dtype=torch.int64)
    weights = torch.empty(tokens, choices)
    route_step(x, gate, experts, weights).run()
    return experts, weights


def route_step(
    x: torch.Tensor, gate: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> Step:
    """Return `route` as a step that writes experts and weights. x is contiguous."""
    tokens, choices = experts.shape
    logits = torch.empty(tokens, gate.shape[0])
    numbers = _SIGNATURE.numbers(
        x=x.data_ptr(),
        gate=gate.data_ptr(),
        logits=logits.data_ptr(),
        experts=experts.data_ptr(),
        weights=weights.data_ptr(),
        tokens=tokens,
        columns=x.shape[1],
        count=gate.shape[0],
        choices=choices,
    )
    function = _compiled(instruction_set(), x.dtype == torch.bfloat16).function("route")
    threads = 1 if tokens <= _FEW else None
    return Step(function, _SIGNATURE, numbers, (x, gate, experts, weights, logits), threads)


def look_up_step(experts: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> Step:
    """Return a step that writes, for each chosen expert, the numbers that a table has for it.

    All are contiguous int64. `experts` [K] choose rows of `table` [E, n]. `targets` [K, n] are the
    addresses to write to.
    """
    numbers = _LOOK_UP.numbers(
        experts=experts.data_ptr(),
        table=table.data_ptr(),
        targets=targets.data_ptr(),
        choices=targets.shape[0],
        columns=targets.shape[1],
    )
    function = _compiled(instruction_set(), False).function("look_up")
    return Step(function, _LOOK_UP, numbers, (experts, table, targets), threads=1)


@functools.cache
def _compiled(instructions: InstructionSet | None, bf16: bool) -> Compiled:
    assert instructions is not None
    module = ir.Module("router")
    _Route(module, LANES[instructions], bf16).write()
    _write_look_up(module)
    return compile_module(module, instructions)


def _write_look_up(module: ir.Module) -> None:
    function = Function(module, "look_up")
    given = _LOOK_UP.read_by(function)
    experts, table, targets = (given.pointer(name) for name in ("experts", "table", "targets"))
    columns = given.number("columns")
    with (
        function.each_item(function.pointer, function.constant(i64, 1)),
        function.loop(0, given.number("choices"), 1) as (choice, _),
        function.loop(0, columns, 1) as (column, _),
    ):
        number = table.load(i64, (experts.load(i64, choice * 8) * columns + column) * 8)
        target = targets.load(i64, (choice * columns + column) * 8)
        function.address(target).store(number)
    function.finish()


class _Route:
    """A function that routes token after token. An item of work is a token."""

    def __init__(self, module: ir.Module, lanes: int, bf16: bool) -> None:
        self._function, self._lanes, self._bf16 = Function(module, "route"), lanes, bf16
        self._given = _SIGNATURE.read_by(self._function)
        self._ranks = self._function.scratch(_MAX_EXPERTS * 4)

    def write(self) -> None:
        function, given = self._function, self._given
        count, choices = given.number("count"), given.number("choices")
        with function.each_item(function.pointer, given.number("tokens")) as token:
            with function.loop(0, count, 1) as (expert, _):
                logit = self._logit(token, expert)
                given.pointer("logits").store(logit, (token * count + expert) * 4)
                self._ranks.store(self._rank(logit), expert * 4)
            first = token * choices
            with function.loop(first, first + choices, 1) as (place, _):
                self._choose(token, place, count)
            self._soften(first, choices)
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
        """Return the logit, or a finite number for NaN."""
        finite = self._function.maximum(logit, self._function.constant(f32, _LOWEST))
        return logit.compare("==", logit).choose(finite, _NO_NUMBER)

    def _choose(self, token: Value, place: Value, count: Value) -> None:
        """Store the best expert that is left, and its logit instead of its weight."""
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

    def _soften(self, first: Value, choices: Value) -> None:
        """Turn logits into weights. The first logit is the largest."""
        function, weights = self._function, self._given.pointer("weights")
        largest = weights.load(f32, first * 4)
        zero = function.constant(f32, 0.0)
        with function.loop(first, first + choices, 1, [zero]) as (place, sums):
            below = weights.load(f32, place * 4) - largest
            power = exponential(function, below)
            power = below.compare("==", below).choose(power, below)  # NaN stays NaN
            weights.store(power, place * 4)
            sums[0] = sums[0] + power
        with function.loop(first, first + choices, 1) as (place, _):
            weights.store(weights.load(f32, place * 4) / sums[0], place * 4)
