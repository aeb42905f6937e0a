"""Programs of kernels: many steps in one call, without Python between them.

For one token, Python takes as long to prepare a small kernel as the kernel takes, and the other
threads fall asleep meanwhile. A program is prepared once; then all threads walk through it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from llvmlite import ir

from mixchat.kernels import threads
from mixchat.kernels.compile import Compiled, compile_module, instruction_set
from mixchat.kernels.emit import Function, Pointer, Value, i32, i64, void
from mixchat.kernels.signature import Arguments, Numbers, Signature, copy_of
from mixchat.kernels.threads import NativeFunction

_SIGNATURE = Signature("steps", "groups", "count", "barrier", "team_size")
_STEP = 16  # bytes in `steps`: the addresses of its function and of its arguments
_GROUP = 24  # bytes in `groups`: where its parallel steps end, where it ends, threads that arrived


@dataclass
class Step:
    """A kernel with its arguments.

    keeps: the tensors that the arguments point to, for they must live as long. threads: as many as
    it pays to run it on alone; None for all.
    """

    function: NativeFunction
    signature: Signature
    numbers: Numbers
    keeps: tuple[torch.Tensor | None, ...]
    threads: int | None = None

    def run(self) -> None:
        """Run it now, and wait for it."""
        self.function.run(self.numbers, self.threads or torch.get_num_threads())
        self.numbers[0] = 0

    def copy(self) -> Step:
        """Return the same step with arguments of its own, for the same tensors."""
        return replace(self, numbers=copy_of(self.numbers))

    def set(self, **given: int) -> None:
        """Replace some arguments."""
        self.signature.set(self.numbers, **given)

    def address(self, name: str) -> int:
        """Return the address of an argument, for a step that writes it."""
        return self.signature.address(self.numbers, name)


@dataclass
class Group:
    """Steps between two points at which all threads wait for each other.

    All threads share the work of the `parallel` steps, which do not need each other. Whoever is
    ready last then runs the steps of `after` alone, one by one.
    """

    parallel: Sequence[Step] = ()
    after: Sequence[Step] = ()

    @property
    def steps(self) -> list[Step]:
        """Return all steps, in order."""
        return [*self.parallel, *self.after]


class Program:
    """Groups of steps, to be run again and again."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._steps = [step for group in groups for step in group.steps]
        addresses = [(s.function.address, ctypes.addressof(s.numbers)) for s in self._steps]
        ends, place = [], 0
        for group in groups:
            ends.append((place + len(group.parallel), place + len(group.steps), 0))
            place += len(group.steps)
        self._tables = torch.tensor(addresses), torch.tensor(ends)
        barrier, team_size = threads.team_functions() or (0, 0)
        self._numbers = _SIGNATURE.numbers(
            steps=self._tables[0].data_ptr(),
            groups=self._tables[1].data_ptr(),
            count=len(ends),
            barrier=barrier,
            team_size=team_size,
        )

    def run(self) -> None:
        """Run all steps, on torch's threads."""
        if threads.team_functions() is None:
            for step in self._steps:
                step.run()
            return
        _compiled().function("walk").run(self._numbers, torch.get_num_threads())


@functools.cache
def _compiled() -> Compiled:
    instructions = instruction_set()
    assert instructions is not None
    module = ir.Module("program")
    _Walk(module).write()
    return compile_module(module, instructions)


class _Walk:
    """The function `walk`, in which each thread goes through all groups."""

    def __init__(self, module: ir.Module) -> None:
        self._function = Function(module, "walk")
        self._given: Arguments = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function, given = self._function, self._given
        groups, start = given.pointer("groups"), function.constant(i64, 0)
        threads = function.call_address(given.number("team_size"), i32).sign_extended(i64)
        with function.loop(0, given.number("count"), 1, [start]) as (group, carried):
            here, first = groups.plus(group * _GROUP), carried[0]
            parallel_end, end = here.load(i64), here.load(i64, 8)
            with function.loop(first, parallel_end, 1) as (step, _):
                self._call(step)
            arrived = here.plus(16)
            with function.when(arrived.take_next().compare("==", threads - 1)):
                # The counters of work start at 0 again the next time.
                arrived.store(function.constant(i64, 0))
                with function.loop(first, parallel_end, 1) as (step, _):
                    self._arguments_of(step).store(function.constant(i64, 0))
                with function.loop(parallel_end, end, 1) as (step, _):
                    self._call(step)
                    self._arguments_of(step).store(function.constant(i64, 0))
            function.call_address(given.number("barrier"), void)
            carried[0] = end
        function.finish()

    def _call(self, step: Value) -> None:
        kernel = self._given.pointer("steps").load(i64, step * _STEP)
        self._function.call_address(kernel, void, self._arguments_of(step))

    def _arguments_of(self, step: Value) -> Pointer:
        return self._function.address(self._given.pointer("steps").load(i64, step * _STEP + 8))
