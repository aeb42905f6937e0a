"""Kernels with their arguments, and programs of many steps in one call, without Python.

For one token, Python takes as long to prepare a small kernel as the kernel takes. A program is
prepared once.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from mixchat.kernels.cpu import threads
from mixchat.kernels.cpu.compile import compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, Pointer, Value, i32, i64, void
from mixchat.kernels.cpu.threads import NativeFunction

Numbers = ctypes.Array[ctypes.c_int64]  # the arguments of a kernel
Argument: TypeAlias = int | float | torch.Tensor | None


class Signature:
    """The names of a kernel's arguments, in their order. Each is a 64-bit number.

    The counter of `Function.each_item` comes before them.
    """

    def __init__(self, *names: str) -> None:
        self._indices = {name: index for index, name in enumerate(("next", *names))}
        self._array: type[Numbers] = ctypes.c_int64 * len(self._indices)

    def step(
        self, function: NativeFunction, threads: int | None = None, **arguments: Argument
    ) -> Step:
        """Return a step with these arguments. It keeps tensors, and the other arguments are 0.

        A number with a point is one of fp32. threads: that `Step.run` uses, None for all.
        """
        numbers = self._array()
        for name, argument in arguments.items():
            numbers[self._indices[name]] = _as_integer(argument)
        keeps = [each for each in arguments.values() if isinstance(each, torch.Tensor)]
        return Step(function, self, numbers, keeps, threads)

    def set(self, numbers: Numbers, **arguments: int) -> None:
        for name, number in arguments.items():
            numbers[self._indices[name]] = number

    def get(self, numbers: Numbers, name: str) -> int:
        return numbers[self._indices[name]]

    def address(self, numbers: Numbers, name: str) -> int:
        return ctypes.addressof(numbers) + 8 * self._indices[name]

    def read_by(self, function: Function) -> Arguments:
        return Arguments(function, self._indices)


def _as_integer(argument: Argument) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        bits: int = struct.unpack("i", struct.pack("f", argument))[0]
        return bits
    return argument or 0


class Arguments:
    """The arguments of a function that is being written."""

    def __init__(self, function: Function, indices: dict[str, int]) -> None:
        self.function = function
        self._indices = indices

    def load(self, name: str, value_type: Any) -> Value:
        """Load an argument from the lowest of its 64 bits."""
        return self.function.pointer.load(value_type, 8 * self._indices[name])

    def number(self, name: str) -> Value:
        return self.load(name, i64)

    def address(self, name: str) -> Pointer:
        """Return the address of an argument."""
        return self.function.pointer.plus(8 * self._indices[name])

    def pointer(self, name: str) -> Pointer:
        return self.function.address(self.number(name))


@dataclass
class Step:
    """A kernel with its arguments."""

    function: NativeFunction
    signature: Signature
    numbers: Numbers
    keeps: Sequence[torch.Tensor]  # that the arguments point to
    threads: int | None = None  # that `run` uses, None for all

    def run(self) -> None:
        self.function.run(self.numbers, self.threads or torch.get_num_threads())
        self.numbers[0] = 0

    def copy(self, function: NativeFunction | None = None) -> Step:
        """Return the step, or that of another kernel, with its own array of the same arguments."""
        numbers = type(self.numbers).from_buffer_copy(self.numbers)
        # `dataclasses.replace` takes five times as long, once for each expert of a prompt.
        return Step(function or self.function, self.signature, numbers, self.keeps, self.threads)

    def set(self, **arguments: int) -> None:
        self.signature.set(self.numbers, **arguments)

    def get(self, name: str) -> int:
        return self.signature.get(self.numbers, name)

    def address(self, name: str) -> int:
        """Return the address of an argument."""
        return self.signature.address(self.numbers, name)


@dataclass(frozen=True)
class Stage:
    """Steps of a program between two points at which all threads wait for each other.

    All threads share the work of the steps, which must not need each other. One thread runs them in
    order if the stage is `alone`.
    """

    steps: Sequence[Step]
    alone: bool = False


def together(*steps: Step) -> Stage:
    """Return a stage whose work all threads share."""
    return Stage(steps)


def alone(*steps: Step) -> Stage:
    """Return a stage that one thread runs in this order."""
    return Stage(steps, alone=True)


_SIGNATURE = Signature("steps", "stages", "count", "team_size", "give_way", "done")
_STEP_BYTES = 16  # in `steps`: the addresses of function and arguments
# In `stages`: the ends of the shared steps and of the others, and the threads that arrived.
_STAGE_BYTES = 24
# Looks at the other threads' progress, some microseconds. Then a thread gives way to others,
# because another program may have the core of the thread that it waits for.
_SPINS = 400


class Program:
    """Stages, to be run again and again."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._steps = [step for stage in stages for step in stage.steps]
        addresses = [(s.function.address, ctypes.addressof(s.numbers)) for s in self._steps]
        ends = _ends(stages)
        self._walk: Step | None = None
        team_size = threads.team_size_function()
        if team_size is not None:
            self._walk = _SIGNATURE.step(
                _compiled().function("walk"),
                steps=torch.tensor(addresses),
                stages=torch.tensor(ends),
                count=len(ends),
                team_size=team_size,
                give_way=threads.give_way_function(),
            )

    def run(self) -> None:
        if self._walk is None:
            for step in self._steps:
                step.run()
            return
        self._walk.set(done=0)
        self._walk.run()


def _ends(stages: Sequence[Stage]) -> list[list[int]]:
    """Return the table `stages`. The thread that is ready last runs what follows alone.

    For 2 shared steps, 1 alone, 3 alone and 1 shared it is [[2, 6, 0], [7, 7, 0]].
    """
    ends: list[list[int]] = []
    end = 0
    for stage in stages:
        end += len(stage.steps)
        if not stage.alone:
            ends.append([end, end, 0])
        elif ends:
            ends[-1][1] = end
        else:
            ends.append([0, end, 0])
    return ends


@compiled_here
def _compiled(module: Any, lanes: int) -> None:
    _Walk(module).write()


class _Walk:
    """The function `walk`, in which each thread goes through all stages."""

    def __init__(self, module: Any) -> None:
        self._function = Function(module, "walk")
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        stages = args.pointer("stages")
        start = function.constant(i64, 0)
        team = function.call_address(args.number("team_size"), i32).sign_extended(i64)
        with function.loop(0, args.number("count"), 1, [start]) as (stage, carried):
            entry = stages.plus(stage * _STAGE_BYTES)
            first = carried[0]
            shared_end = entry.load(i64)
            end = entry.load(i64, 8)
            with function.loop(first, shared_end, 1) as (step, _):
                self._call(step)
            # The last thread to arrive has seen all results ("acq_rel"). It resets what the next
            # run counts, and only then lets the others go on ("release").
            arrived = entry.plus(16)
            with function.when(arrived.take_next("acq_rel").compare("==", team - 1)):
                arrived.store(function.constant(i64, 0))
                with function.loop(first, shared_end, 1) as (step, _):
                    self._arguments_of(step).store(function.constant(i64, 0))
                with function.loop(shared_end, end, 1) as (step, _):
                    self._call(step)
                    self._arguments_of(step).store(function.constant(i64, 0))
                args.address("done").publish(stage + 1)
            with function.wait(args.address("done"), stage + 1) as spins:
                # Lets the core's other hyperthread compute for a moment. Hint 1 of ARM is `yield`.
                if instruction_set() == "neon":
                    function.call("llvm.aarch64.hint", void, function.constant(i32, 1))
                else:
                    function.call("llvm.x86.sse2.pause", void)
                with function.when(spins.compare(">", _SPINS)):
                    function.call_address(args.number("give_way"), void)
            carried[0] = end
        function.finish()

    def _call(self, step: Value) -> None:
        kernel = self._args.pointer("steps").load(i64, step * _STEP_BYTES)
        self._function.call_address(kernel, void, self._arguments_of(step))

    def _arguments_of(self, step: Value) -> Pointer:
        return self._function.address(self._args.pointer("steps").load(i64, step * _STEP_BYTES + 8))
