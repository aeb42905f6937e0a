"""Counts the cycles of a token's product on CPUs that are not here, for every type of codes.

    python tests/benchmarks/cpu_budget.py [--json] [--cpu NAME ...] [--type NAME ...]

LLVM compiles the loop over a band's blocks for each CPU, and llvm-mca 22 (Debian: llvm-22) counts
the cycles of a block with its inner loops written out. It knows ports, latencies and the reorder
buffer. It does not know caches, prefetchers and the front end. Its model of Zen 5 is that of Zen 4.
Sapphire Rapids has one port for vpdpbusd with 512 bits in its model, where servers have two.

`cycles` are for 64 weights. `gb_s` is what a core at 4 GHz decodes and multiplies in a second. The
memory of a desktop gives each of 6 cores 12 GB/s, that of a laptop gives each of 4 cores 12 GB/s.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple
from unittest import mock

import llvmlite.binding as llvm
from llvmlite import ir

from mixchat.kernels.cpu import compile as compiler
from mixchat.kernels.cpu.compile import CPUS, InstructionSet
from mixchat.kernels.cpu.tile import Tile
from mixchat.weights.matrix.linear import TYPES
from mixchat.weights.matrix.quant_type import BlockCodes, QuantType

UNITS = {name: codes.units for name, codes in TYPES.items() if isinstance(codes, BlockCodes)}
MCA = shutil.which("llvm-mca-22")
GHZ = 4
_BANDS = 2  # that the tile of one token reads at once
_ITERATIONS = 12
_LABEL = re.compile(r"^(\.?[\w.$]+):")
_JUMP = re.compile(r"^(?:j\w+|b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\d+,)\s+(\.L\w+)$")
_AVX512 = (*CPUS["avx512"].needs, "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bitalg")


class Processor(NamedTuple):
    """A CPU of llvm-mca, with the features that kernels ask for beside its instruction set's."""

    instructions: InstructionSet
    features: tuple[str, ...] = ()
    triple: str = "x86_64-unknown-linux-gnu"


PROCESSORS = {
    "skylake": Processor("avx2"),
    "alderlake": Processor("avx2", ("avxvnni",)),
    "znver3": Processor("avx2"),
    "icelake-server": Processor("avx512", _AVX512),
    "sapphirerapids": Processor("avx512", (*_AVX512, "avxvnni")),
    "znver4": Processor("avx512", _AVX512),
    "neoverse-n1": Processor("neon", ("dotprod",), "aarch64-unknown-linux-gnu"),
}


@dataclass(frozen=True)
class Row:
    """What one type of codes costs on one CPU."""

    type: str
    cpu: str
    cycles: float
    gb_s: float


def counted(quant_type: QuantType, cpu: str) -> Row:
    """Return the cycles of 64 weights, as llvm-mca counts them."""
    with _only_features_of(PROCESSORS[cpu]):
        unit = UNITS[quant_type].unit_for(PROCESSORS[cpu].instructions, 1, True)
        module = ir.Module(quant_type)
        Tile(module, unit, True, False, _BANDS, 1)
        lines = _compiled_lines(str(module), f"Tile_{_BANDS}_1", cpu)
    block = _block(lines, unit.block // (unit.columns * unit.unrolled))
    weights = unit.block * unit.band * _BANDS
    cycles = _cycles(block, cpu) / weights * 64
    size = 64 * unit.bits / 8 + 64 / unit.block * unit.scale_bytes
    return Row(quant_type, cpu, round(cycles, 2), round(size / cycles * GHZ, 1))


@contextmanager
def _only_features_of(processor: Processor) -> Iterator[None]:
    names = (*CPUS[processor.instructions].needs, *processor.features)
    features = dict.fromkeys(names, True)
    compiler.has_feature.cache_clear()
    try:
        with mock.patch.object(llvm, "get_host_cpu_features", return_value=features):
            yield
    finally:
        compiler.has_feature.cache_clear()


def _compiled_lines(text: str, function: str, cpu: str) -> list[str]:
    """Return the instructions and labels of a function, for a CPU."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    processor = PROCESSORS[cpu]
    features = {"avx512": "-prefer-256-bit", "avx2": "-avx512f", "neon": ""}
    machine = llvm.Target.from_triple(processor.triple).create_target_machine(
        cpu=cpu, features=features[processor.instructions], opt=3, reloc="pic", codemodel="small"
    )
    module = llvm.parse_assembly(text)
    compiler.optimize(module, machine)
    assembly = machine.emit_assembly(module).splitlines()
    first = next(at for at, line in enumerate(assembly) if line.startswith(f"{function}:"))
    lines = []
    for line in assembly[first + 1 :]:
        if line.startswith(".Lfunc_end"):
            break
        line = re.split(r"#(?!-?\d|:)|//", line)[0].strip()
        if line and (not line.startswith(".") or _LABEL.match(line)):
            lines.append(line)
    return lines


def _block(lines: Sequence[str], turns: int) -> list[str]:
    """Return the body of the longest loop, with the loops in it written `turns` times."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        jump = _JUMP.match(line)
        if jump and labels[jump[1]] < at:
            ends[labels[jump[1]]] = at
    outer = max(ends, key=lambda start: ends[start] - start)
    block = []
    at = outer
    while at <= ends[outer]:
        end = ends.get(at, at) if at != outer else at
        body = [line for line in lines[at : end + 1] if not _LABEL.match(line)]
        block += body * (turns if end > at else 1)
        at = end + 1
    return block


def _cycles(block: Sequence[str], cpu: str) -> float:
    """Return the cycles of a block that is one of many."""
    if MCA is None:
        raise SystemExit("llvm-mca 22 is missing: apt-get install llvm-22")
    text = "\n".join(["here:", *(re.sub(r"\.L\w+", "here", line) for line in block)])
    command = [MCA, f"-mcpu={cpu}", f"-mtriple={PROCESSORS[cpu].triple}", "--json"]
    command.append(f"-iterations={_ITERATIONS}")
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]
    return float(summary["TotalCycles"]) / _ITERATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cpu", nargs="+", choices=PROCESSORS, default=[*PROCESSORS])
    parser.add_argument("--type", nargs="+", choices=UNITS, default=[*UNITS])
    flags = parser.parse_args()
    rows = [counted(name, cpu) for name in flags.type for cpu in flags.cpu]
    if flags.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print("cycles for 64 weights (GB/s of a core at 4 GHz)")
    print(" " * 10 + "".join(f"{cpu:>17}" for cpu in flags.cpu))
    for name in flags.type:
        cells = (f"{row.cycles:9.2f} ({row.gb_s:5.1f})" for row in rows if row.type == name)
        print(f"{name:10}" + "".join(cells))


if __name__ == "__main__":
    main()
