"""Gives the experts that rows have chosen their slots in a program, without Python.

A slot is the steps of one expert in a program. Its matrices and its rows are set when it runs.

P = pairs of a row and an expert that it has chosen, E = experts, S = slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llvmlite import ir

from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, Pointer, Value, i64
from mixchat.kernels.cpu.program import Signature, Step

_SIGNATURE = Signature(
    "experts",
    "rows",
    "pairs",
    "table",
    "count",
    "columns",
    "starts",
    "targets",
    "slots",
    "factors",
    "of_rows",
    "x_rows",
    "places",
)


@dataclass(frozen=True)
class Slots:
    """The arguments of steps that `arrange_step` sets. All tensors are int64 and contiguous.

    targets: the addresses of the arguments [S, n + m], first n that an expert has, then m that its
    rows give. factors [m, 3]: such an argument is the first number, plus the second one times the
    expert's first place, plus the third one times its count of rows.
    """

    targets: torch.Tensor
    factors: torch.Tensor


def arrange_step(
    experts: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    slots: Slots,
    order: torch.Tensor,
) -> Step:
    """Return a step that fills the slots with the chosen experts, in the order of their numbers.

    experts, rows [P]: a pair is a row and an expert that it has chosen. table [E, n]: the arguments
    that each expert has. order [2, P] is written: the rows of all pairs, expert by expert, and each
    pair's place there. Slots that are left get no rows. All tensors are int64 and contiguous.
    `set(pairs=count)` lets only the first pairs count.
    """
    return _SIGNATURE.step(
        _compiled().function("arrange"),
        threads=1,
        experts=experts,
        rows=rows,
        pairs=len(rows),
        table=table,
        count=len(table),
        columns=table.shape[1],
        starts=torch.empty(len(table), dtype=torch.int64),
        targets=slots.targets,
        slots=len(slots.targets),
        factors=slots.factors,
        of_rows=len(slots.factors),
        x_rows=order[0],
        places=order[1],
    )


@compiled_here
def _compiled(module: ir.Module, lanes: int) -> None:
    _Arrange(module).write()


class _Arrange:
    """The function `arrange`. It is one item of work."""

    def __init__(self, module: ir.Module) -> None:
        self._function = Function(module, "arrange")
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        zero = function.constant(i64, 0)
        starts = args.pointer("starts")
        count = args.number("count")
        with function.each_item(function.pointer, function.constant(i64, 1)):
            with function.loop(0, count, 1) as (expert, _):
                starts.store(zero, expert * 8)
            with function.loop(0, args.number("pairs"), 1) as (pair, _):
                self._count(self._expert_of(pair))
            with function.loop(0, count, 1, [zero, zero]) as (expert, carried):
                first, slot = carried
                rows = starts.load(i64, expert * 8)
                starts.store(first, expert * 8)
                is_chosen = rows.compare(">", 0)
                with function.when(is_chosen):
                    self._fill(slot, expert, first, rows)
                carried[:] = first + rows, is_chosen.choose(slot + 1, slot)
            with function.loop(carried[1], args.number("slots"), 1) as (slot, _):
                self._fill(slot, zero, zero, zero)
            with function.loop(0, args.number("pairs"), 1) as (pair, _):
                place = self._count(self._expert_of(pair))
                row = args.pointer("rows").load(i64, pair * 8)
                args.pointer("x_rows").store(row, place * 8)
                args.pointer("places").store(place, pair * 8)
        function.finish()

    def _expert_of(self, pair: Value) -> Value:
        return self._args.pointer("experts").load(i64, pair * 8)

    def _count(self, expert: Value) -> Value:
        """Add one to the expert's number in `starts`, and return the number before."""
        starts = self._args.pointer("starts")
        number = starts.load(i64, expert * 8)
        starts.store(number + 1, expert * 8)
        return number

    def _fill(self, slot: Value, expert: Value, first: Value, rows: Value) -> None:
        function = self._function
        args = self._args
        columns = args.number("columns")
        of_rows = args.number("of_rows")
        table = args.pointer("table")
        factors = args.pointer("factors")
        targets = args.pointer("targets").plus(slot * (columns + of_rows) * 8)
        with function.loop(0, columns, 1) as (column, _):
            self._target(targets, column).store(table.load(i64, (expert * columns + column) * 8))
        with function.loop(0, of_rows, 1) as (number, _):
            base, of_place, of_row = (factors.load(i64, (number * 3 + at) * 8) for at in range(3))
            target = self._target(targets, columns + number)
            target.store(base + of_place * first + of_row * rows)

    def _target(self, targets: Pointer, column: Value) -> Pointer:
        return self._function.address(targets.load(i64, column * 8))
