"""Finds the codes of a trellis with the least error (Viterbi's algorithm), many columns at once.

A lane of a vector is a column of a band. The state of a row is its window, and the window of the
row before has one bit more at the low end and one less at the high end. Rows are visited from the
last to the first. The costs of all states are in memory, and for each row a bit for each pair of
states says which of two states leads to it.

The ring has no end, so the algorithm runs twice: from row 31 back to row 32 with any state at the
end, and from row 63 to row 0 with the state that the first run has found for row 0 at both ends.

N = columns of bands, L = lanes, R = RING rows.
"""

from __future__ import annotations

import torch
from llvmlite import ir
from torch.nn import functional

from mixchat.kernels.cpu.compile import LANES, compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i16, i32, i64, vector
from mixchat.kernels.cpu.program import Signature
from mixchat.kernels.cpu.trellis_units import FACTOR, RING, SUBSET_BITS, WINDOW, subset

_SIGNATURE = Signature("x", "weights", "levels", "codes", "chosen", "count")
_STATES = 1 << WINDOW
_SUBSETS = 1 << SUBSET_BITS
_MASK = 2  # bytes of a bit for each lane
# Lanes that are traced back at once, because each step of a lane waits for the one before.
_TRACED = 4
_IMPOSSIBLE = 1e30


def encode_trellis(
    x: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of x [N, R] with the least sum of `weights` [N, R] times squared errors.

    `levels` [16 * 2^planes] are those of each index. Codes are int64 [N, 1 + planes], the ring and
    the planes, with row 0 in the lowest bit. The second result [N, R] has the levels chosen. All
    numbers are fp32 on the CPU, and finite.
    """
    instructions = instruction_set()
    assert instructions is not None
    (count, _), lanes = x.shape, LANES[instructions]
    planes = (len(levels) // _SUBSETS).bit_length() - 1
    # A row's numbers for all columns lie side by side, as a vector loads them.
    by_row = [
        functional.pad(numbers.T, (0, -count % lanes)).contiguous() for numbers in (x, weights)
    ]
    padded = by_row[0].shape[1]
    codes = torch.empty(padded, 1 + planes, dtype=torch.int64)
    chosen = torch.empty(padded, RING)
    _SIGNATURE.step(
        _compiled(planes).function("encode"),
        x=by_row[0],
        weights=by_row[1],
        levels=levels.contiguous(),
        codes=codes,
        chosen=chosen,
        count=padded,
    ).run()
    return codes[:count], chosen[:count]


@compiled_here
def _compiled(module: ir.Module, lanes: int, planes: int) -> None:
    _Encode(module, lanes, planes).write()


class _Encode:
    """The function `encode`. An item of work is L columns."""

    def __init__(self, module: ir.Module, lanes: int, planes: int) -> None:
        function = self._function = Function(module, "encode")
        self._lanes = lanes
        self._planes = planes
        self._size = 4 * lanes
        self._floats = vector(f32, lanes)
        self._integers = vector(i32, lanes)
        self._args = _SIGNATURE.read_by(function)
        self._costs = [function.scratch(_STATES * self._size) for _ in range(2)]
        self._errors = function.scratch(_SUBSETS * self._size)
        self._from_high = function.scratch(RING * _STATES // 2 * _MASK)
        self._bits = function.scratch(RING * _SUBSETS * planes * _MASK)
        self._states = function.scratch(self._size)

    def write(self) -> None:
        function = self._function
        count = self._args.number("count")
        with (
            function.each_item(function.pointer, count // self._lanes) as item,
            function.loop(0, 2, 1) as (run, _),
        ):
            first = item * self._lanes
            is_first = run.compare("==", 0)
            self._start(is_first)
            end = is_first.choose(function.constant(i64, RING // 2), 0)
            with function.loop(0, RING, 2) as (turn, _):
                for odd in (0, 1):
                    row = (end - turn + (RING - 1 - odd)) & RING - 1
                    self._visit(first, row, self._costs[odd], self._costs[1 - odd])
            with function.when(is_first):
                self._find_state_of_row_0()
            with function.when(is_first.compare("==", 0)):
                self._trace(first)
        function.finish()

    def _start(self, is_first: Value) -> None:
        """Let the first run start from any state, and the second from the state that was found."""
        zeros = self._function.constant(self._floats, 0.0)
        unless_found = is_first.choose(zeros, _IMPOSSIBLE)
        states = self._states.load(self._integers)
        for state in range(_STATES):
            cost = states.compare("==", state).choose(zeros, unless_found)
            self._costs[0].store(cost, state * self._size)

    def _visit(self, first: Value, row: Value, old: Pointer, new: Pointer) -> None:
        """Find the costs of a row's states from the costs of the next row's."""
        function = self._function
        args = self._args
        half = _STATES // 2
        offset = (row * args.number("count") + first) * 4
        x, weights = (args.pointer(name).load(self._floats, offset) for name in ("x", "weights"))
        # w (x - level)^2 = w x^2 + (w level - 2 w x) level, whose first term all codes share.
        doubled = x * weights * -2.0
        # The planes are free in each state, so each subset has one best choice of their bits.
        for number in range(_SUBSETS):
            choices: list[_Choice] = []
            for choice in range(2**self._planes):
                index = (number + _SUBSETS * choice) * 4
                level = args.pointer("levels").load(f32, index).broadcast(self._lanes)
                error = function.multiply_add(weights, level, doubled) * level
                choices.append((error, []))
            while len(choices) > 1:
                choices = list(map(_better, choices[::2], choices[1::2]))
            error, bits = choices[0]
            for plane, plane_bit in enumerate(bits):
                self._store_bits(plane_bit, self._bits, self._offset_of_bit(row, number, plane))
            self._errors.store(error, number * self._size)
        for low in range(half):
            low_cost, high_cost = (
                old.load(self._floats, state * self._size) for state in (low, low + half)
            )
            cost, (bit,) = _better((low_cost, []), (high_cost, []))
            self._store_bits(bit, self._from_high, (row * half + low) * _MASK)
            for state in (2 * low, 2 * low + 1):
                error = self._errors.load(self._floats, subset(state) * self._size)
                new.store(cost + error, state * self._size)

    def _find_state_of_row_0(self) -> None:
        """Trace each lane's cheapest state back from row 32 to row 0. Of equals, take the first."""
        function = self._function
        costs = self._costs[0]
        start = [costs.load(self._floats), function.constant(self._integers, 0)]
        with function.loop(1, _STATES, 1, start) as (state, best):
            cost = costs.load(self._floats, state * self._size)
            is_less = cost.compare("<", best[0])
            candidate = state.narrowed(i32).broadcast(self._lanes)
            best[:] = [is_less.choose(cost, best[0]), is_less.choose(candidate, best[1])]
        self._states.store(best[1])
        with function.loop(0, self._lanes, _TRACED) as (lane, _):
            loaded = [self._states.load(i32, (lane + number) * 4) for number in range(_TRACED)]
            start = [state.widened(i64) for state in loaded]
            with function.loop(RING // 2, RING, 1, start) as (row, states):
                states[:] = [
                    self._next_state(row, state, lane + number)
                    for number, state in enumerate(states)
                ]
            for number, state in enumerate(states):
                self._states.store(state.narrowed(i32), (lane + number) * 4)

    def _next_state(self, row: Value, state: Value, lane: Value) -> Value:
        """Return the state of the next row, which leads to this state of a row."""
        low = state >> 1
        offset = (row * (_STATES // 2) + low) * _MASK
        return low + (self._bit_at(self._from_high, offset, lane) << WINDOW - 1)

    def _trace(self, first: Value) -> None:
        """Write codes and levels from row 0 on."""
        function = self._function
        args = self._args
        size = 2 + self._planes
        with function.loop(0, self._lanes, _TRACED) as (lane, _):
            zero = function.constant(i64, 0)
            start: list[Value] = []
            for number in range(_TRACED):
                state = self._states.load(i32, (lane + number) * 4).widened(i64)
                start += [state, *[zero] * (1 + self._planes)]
            with function.loop(0, RING, 1, start) as (row, carried):
                for number in range(_TRACED):
                    own = slice(number * size, (number + 1) * size)
                    state, *codes = carried[own]
                    carried[own] = self._traced(row, state, codes, lane + number, first)
            for number in range(_TRACED):
                _, *codes = carried[number * size : (number + 1) * size]
                column = (first + lane + number) * (1 + self._planes)
                for word, code in enumerate(codes):
                    args.pointer("codes").store(code, (column + word) * 8)

    def _traced(
        self, row: Value, state: Value, codes: list[Value], lane: Value, first: Value
    ) -> list[Value]:
        """Return the state of the next row, and the codes with the bits of this row."""
        args = self._args
        index = (state * FACTOR & 0xFFFF) >> 16 - SUBSET_BITS
        bits = [state & 1]
        for plane in range(self._planes):
            offset = self._offset_of_bit(row, index, plane)
            bits.append(self._bit_at(self._bits, offset, lane))
        for plane, bit in enumerate(bits[1:]):
            index = index | bit << SUBSET_BITS + plane
        level = args.pointer("levels").load(f32, index * 4)
        args.pointer("chosen").store(level, ((first + lane) * RING + row) * 4)
        codes = [code | (bit << row) for code, bit in zip(codes, bits, strict=True)]
        return [self._next_state(row, state, lane), *codes]

    def _offset_of_bit(self, row: Value, number: Value | int, plane: int) -> Value:
        return ((row * _SUBSETS + number) * self._planes + plane) * _MASK

    def _store_bits(self, bits: Value, masks: Pointer, offset: Value) -> None:
        mask = bits.bits_as(ir.IntType(self._lanes))
        masks.store(mask if self._lanes == 16 else mask.widened(i16), offset)

    def _bit_at(self, masks: Pointer, offset: Value, lane: Value) -> Value:
        return masks.load(i16, offset).widened(i64) >> lane & 1


_Choice = tuple[Value, list[Value]]  # an error, and the bits of the planes that lead to it


def _better(first: _Choice, second: _Choice) -> _Choice:
    """Return the choice with the lesser error. The new bit is 1 if that is the second."""
    is_less = second[0].compare("<", first[0])
    bits = [is_less.choose(yes, no) for no, yes in zip(first[1], second[1], strict=True)]
    return is_less.choose(second[0], first[0]), [*bits, is_less]
