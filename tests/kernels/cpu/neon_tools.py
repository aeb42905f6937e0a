"""NEON where there is none: its instructions in those of x86, or ARM's machine code under qemu."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import torch
from patience import PATIENCE_S

from mixchat.kernels.cpu.compile import (
    CPUS,
    Compiled,
    InstructionSet,
    compile_module,
    instruction_set,
    optimize,
)

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_TRIPLE = "aarch64-linux-gnu"
_BASE = 1 << 32  # address of the data under qemu
_SIXTEENS = ", ".join(["i8 16"] * 16)


def _look_up(tables: int) -> str:
    """Return bytes at places of all tables, 0 beyond them, by those of the first and the others."""
    if tables == 1:
        return """
declare <16 x i8> @llvm.x86.ssse3.pshuf.b.128(<16 x i8>, <16 x i8>)
define <16 x i8> @tbl1(<16 x i8> %t0, <16 x i8> %at) {
  %found = call <16 x i8> @llvm.x86.ssse3.pshuf.b.128(<16 x i8> %t0, <16 x i8> %at)
  %is_inside = icmp ult <16 x i8> %at, <SIXTEENS>
  %result = select <16 x i1> %is_inside, <16 x i8> %found, <16 x i8> zeroinitializer
  ret <16 x i8> %result
}""".replace("SIXTEENS", _SIXTEENS)
    given = ", ".join(f"<16 x i8> %t{number}" for number in range(tables))
    others = given.partition(", ")[2]
    return f"""
define <16 x i8> @tbl{tables}({given}, <16 x i8> %at) {{
  %one = call <16 x i8> @tbl1(<16 x i8> %t0, <16 x i8> %at)
  %there = sub <16 x i8> %at, <{_SIXTEENS}>
  %other = call <16 x i8> @tbl{tables - 1}({others}, <16 x i8> %there)
  %result = or <16 x i8> %one, %other
  ret <16 x i8> %result
}}"""


def _dot() -> str:
    adding = "".join(
        f"""
  %of{first} = shufflevector <16 x i32> %all, <16 x i32> %all, <4 x i32> <{places}>
  %s{first + 1} = add <4 x i32> %s{first}, %of{first}"""
        for first in range(4)
        for places in [", ".join(f"i32 {first + 4 * lane}" for lane in range(4))]
    )
    return f"""
define <4 x i32> @sdot(<4 x i32> %s0, <16 x i8> %one, <16 x i8> %other) {{
  %a = sext <16 x i8> %one to <16 x i32>
  %b = sext <16 x i8> %other to <16 x i32>
  %all = mul <16 x i32> %a, %b{adding}
  ret <4 x i32> %s4
}}"""


def compile_emulated(write: Callable[[], str], instructions: InstructionSet, key: str) -> Compiled:
    """Compile a module for this CPU, with NEON's instructions as functions."""
    assert instructions == "neon"
    lines = write().splitlines()
    lines = [line for line in lines if not ("llvm.aarch64" in line and line.startswith("declare"))]
    text = "\n".join([*lines, _dot(), *map(_look_up, range(1, 5))])
    text = text.replace('"llvm.aarch64.neon.sdot.v4i32.v16i8"', "sdot")
    for tables in range(1, 5):
        text = text.replace(f'"llvm.aarch64.neon.tbl{tables}.v16i8"', f"tbl{tables}")
    assert "aarch64" not in text
    return compile_module(lambda: text, instruction_set() or "avx2", text)


def arm_code(module: Any, *, as_text: bool = False) -> Any:
    """Return a module's code for an ARM CPU with NEON and what `has_feature` says."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = "+dotprod" if CPUS["neon"].multiplies_bytes else ""
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine(features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple = _TRIPLE
    parsed.verify()
    optimize(parsed, machine)
    return machine.emit_assembly(parsed) if as_text else machine.emit_object(parsed)


def can_emulate() -> bool:
    return all(map(shutil.which, (COMPILER, EMULATOR)))


class _ArmFunction(NamedTuple):
    code: bytes
    name: str


class ArmModule:
    """Stands for a compiled module. Its functions are for `run_under_qemu`."""

    def __init__(self, text: Callable[[], str], instructions: InstructionSet, key: str) -> None:
        self._code = arm_code(text())

    def function(self, name: str) -> _ArmFunction:
        return _ArmFunction(self._code, name)


def run_under_qemu(directory: Path, steps: Sequence[Any], *others: torch.Tensor) -> None:
    """Run steps of one module as `Step.run` does. Arguments point into tensors of steps or others.

    A file holds the bytes of all tensors and arguments. ARM's code has it as its memory.
    """
    tensors = [*others, *(one for step in steps for one in step.keeps if one is not None)]
    sizes = {one.data_ptr(): one.nbytes for one in tensors}
    sizes |= {ctypes.addressof(step.numbers): ctypes.sizeof(step.numbers) for step in steps}
    places, end = {}, 0
    for address, size in sizes.items():
        places[address], end = end, end + -(-size // 64) * 64 + 64

    def moved(number: int) -> int:
        for address, size in sizes.items():
            if address <= number < address + max(size, 1):
                return _BASE + places[address] + number - address
        return number

    for step in steps:
        step.numbers[:] = [moved(number) for number in step.numbers]
    for table in (one for one in others if one.dtype == torch.int64):  # may hold addresses
        table.apply_(moved)
    memory = bytearray(end)
    for address, size in sizes.items():
        memory[places[address] : places[address] + size] = ctypes.string_at(address, size)
    (directory / "memory").write_bytes(memory)
    (directory / "kernel.o").write_bytes(steps[0].function.code)
    calls = [
        f"void {step.function.name}(void *); {step.function.name}((void *){address});"
        for step in steps
        for address in [moved(ctypes.addressof(step.numbers))]
    ]
    (directory / "main.c").write_text(
        f"""
#include <fcntl.h>
#include <sys/mman.h>
int main(void) {{
    int file = open("memory", O_RDWR), flags = MAP_SHARED | MAP_FIXED;
    if (mmap((void *){_BASE}, {end}, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED)
        return 1;
    {" ".join(calls)}
    return 0;
}}"""
    )
    for command in ([COMPILER, "-static", "-o", "main", "main.c", "kernel.o"], [EMULATOR, "main"]):
        subprocess.run(command, cwd=directory, check=True, timeout=PATIENCE_S)
    found = (directory / "memory").read_bytes()
    for tensor in tensors:
        start = places[tensor.data_ptr()]
        ctypes.memmove(tensor.data_ptr(), found[start : start + tensor.nbytes], tensor.nbytes)
