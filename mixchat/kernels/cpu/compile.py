"""Compiles LLVM's intermediate representation to functions for this CPU."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from mixchat.base.errors import MissingDependencyError
from mixchat.kernels.cpu.object_cache import ObjectCache
from mixchat.kernels.cpu.threads import NativeFunction

# Increase it if kernels change. Then old measurements and machine code are not used.
KERNELS = 11
InstructionSet = Literal["avx512", "avx2", "neon"]
_P = ParamSpec("_P")
# On some x86 CPUs LLVM would split vectors of 512 bits.
_FULL_WIDTH = ",-prefer-256-bit"


class Cpu(NamedTuple):
    """A set of instructions. The named ones are those that LLVM does not choose by itself."""

    needs: tuple[str, ...]  # features, by LLVM's names
    lanes: int  # fp32 numbers of a vector
    operand_bytes: int  # of the named instructions
    look_up: str  # up to 16 bytes of a table
    # Adds four products of bytes to each sum. The first factors are unsigned on x86, signed on ARM.
    add_bytes: str
    operand_bits: int  # of the numbers that LLVM declares for it
    feature: str  # that `add_bytes` needs
    add_words: str | None = None  # makes a sum of two products of words, None if LLVM chooses
    add_pairs: str | None = None  # makes a word of two products of bytes

    @property
    def multiplies_bytes(self) -> bool:
        """Return whether this CPU has `add_bytes`."""
        return has_feature(self.feature)


# LLVM 20 declares the operands of vpdpbusd as 32-bit numbers. Later versions accept that.
CPUS: dict[InstructionSet, Cpu] = {
    "avx512": Cpu(
        needs=("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        lanes=16,
        operand_bytes=64,
        look_up="llvm.x86.avx512.pshuf.b.512",
        add_bytes="llvm.x86.avx512.vpdpbusd.512",
        operand_bits=32,
        feature="avx512vnni",
        add_words="llvm.x86.avx512.pmaddw.d.512",
        add_pairs="llvm.x86.avx512.pmaddubs.w.512",
    ),
    "avx2": Cpu(
        needs=("avx2", "fma"),
        lanes=8,
        operand_bytes=32,
        look_up="llvm.x86.avx2.pshuf.b",
        add_bytes="llvm.x86.avx512.vpdpbusd.256",
        operand_bits=32,
        feature="avxvnni",
        add_words="llvm.x86.avx2.pmadd.wd",
        add_pairs="llvm.x86.avx2.pmadd.ub.sw",
    ),
    # With the lanes of AVX2 it has the bits of AVX2. A vector takes two registers.
    "neon": Cpu(
        needs=("neon",),
        lanes=8,
        operand_bytes=16,
        look_up="llvm.aarch64.neon.tbl1.v16i8",
        add_bytes="llvm.aarch64.neon.sdot.v4i32.v16i8",
        operand_bits=8,
        feature="dotprod",
    ),
}
# The best first, by torch's word for what the CPU has.
_CHOICES: dict[str, tuple[InstructionSet, ...]] = {
    "AVX512": ("avx512", "avx2"),
    "AVX2": ("avx2",),
    "ARM": ("neon",),
}
LANES = {name: cpu.lanes for name, cpu in CPUS.items()}


@functools.cache
def instruction_set() -> InstructionSet | None:
    """Return the best instruction set that kernels are written for, or None if the CPU has none.

    `ATEN_CPU_CAPABILITY=avx2` (or `default`) in the environment limits it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if _is_arm() and os.environ.get("ATEN_CPU_CAPABILITY") != "default":
        capability = "ARM"  # torch has several words for it
    sets = _CHOICES.get(capability, ())
    return next((name for name in sets if all(map(has_feature, CPUS[name].needs))), None)


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


class Compiled:
    """The compiled functions of a module. Each takes one pointer, to its arguments."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._functions: dict[str, NativeFunction] = {}

    def function(self, name: str) -> NativeFunction:
        if name not in self._functions:
            address = self._engine.get_function_address(name)
            self._functions[name] = NativeFunction(address, owner=self._engine)
        return self._functions[name]


def compiled_here(write: Callable[Concatenate[Any, int, _P], None]) -> Callable[_P, Compiled]:
    """Turn a function that writes a module into one that returns the module compiled.

    `write` gets the module, the lanes of a vector, and positional arguments. Each set of
    instructions is compiled once for the same arguments, and kept in files. So the `repr` of an
    argument has to tell it from all others, in every process.
    """
    writer: Callable[..., None] = write

    @functools.cache
    def compiled(instructions: InstructionSet, *arguments: Any) -> Compiled:
        def text() -> str:
            module = ir.Module(write.__module__)
            writer(module, LANES[instructions], *arguments)
            return str(module)

        key = f"{write.__module__} {instructions} {arguments} {_sources_digest()}"
        return compile_module(text, instructions, key)

    @functools.wraps(write)
    def for_this_cpu(*arguments: _P.args, **named: _P.kwargs) -> Compiled:
        instructions = instruction_set()
        assert instructions is not None
        assert not named
        return compiled(instructions, *arguments)

    return for_this_cpu


def kernels_available() -> bool:
    """Return whether this CPU can run kernels, which need AVX2 or NEON."""
    return instruction_set() is not None


def require_kernels() -> None:
    """Raise `MissingDependencyError` if this CPU cannot run kernels."""
    if kernels_available():
        return
    needs = CPUS["neon" if _is_arm() else "avx2"].needs
    missing = [name.upper() for name in needs if not has_feature(name)]
    if missing:
        raise MissingDependencyError(
            f"this CPU has no {' and no '.join(missing)}, which mixchat computes with",
            hint="Use another machine. 'mixchat run --server URL' chats with a model there.",
        )
    raise MissingDependencyError(
        f"ATEN_CPU_CAPABILITY switches {needs[0].upper()} off, which mixchat computes with",
        hint="Unset ATEN_CPU_CAPABILITY.",
    )


@functools.cache
def has_feature(name: str) -> bool:
    """Return whether the CPU has this feature, by LLVM's name."""
    features = llvm.get_host_cpu_features()
    # LLVM does not ask Apple's CPUs. All that run macOS have these two.
    if not features and _is_arm():
        return name in ("neon", "dotprod")
    return bool(features.get(name, False))


def multiplies_bf16() -> bool:
    """Return whether torch multiplies bf16 matrices at full speed here. Only x86 is examined."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    native = has_feature("avx512bf16") or has_feature("amx-bf16")
    return native and torch.backends.cpu.get_cpu_capability() == "AVX512"


def compile_module(text: Callable[[], str], instructions: InstructionSet, key: str) -> Compiled:
    """Compile the module whose text is written by `text`, with no other instructions than these.

    The machine code is cached for this CPU. `key` tells the text from all others.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    # Otherwise LLVM uses AVX-512's masks and 32 registers for vectors of 256 bits, too. Tests of
    # AVX2 on such a CPU would not run what a CPU with AVX2 alone runs.
    if instructions == "avx2":
        features.update({name: False for name in features if name.startswith("avx512")})
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=features.flatten() + ("" if instructions == "neon" else _FULL_WIDTH),
        opt=3,
        jit=True,
    )
    target = (machine.triple, llvm.get_host_cpu_name(), features.flatten(), llvm.llvm_version_info)
    cache = ObjectCache(key, f"{target} {KERNELS}")
    code = cache.load()
    if code is None:
        parsed = llvm.parse_assembly(text())
        parsed.verify()
        optimize(parsed, machine)
        code = machine.emit_object(parsed)
        cache.save(code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Compiled(engine)


@functools.cache
def _sources_digest() -> str:
    """Return a digest of the kernels' sources.

    Writing the text of all modules takes .3 s, so a module's text is not the key of its code.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def optimize(parsed: Any, machine: Any) -> None:
    """Optimize a parsed module in place."""
    # The kernels are vectorized and unrolled as registers allow. What LLVM would add spills sums to
    # the stack.
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
