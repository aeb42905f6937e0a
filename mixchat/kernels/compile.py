"""Compiles LLVM's intermediate representation to functions for this CPU."""

from __future__ import annotations

import functools
import platform
from typing import Any, Literal

import llvmlite.binding as llvm
import torch

from mixchat.base import system
from mixchat.kernels.object_cache import ObjectCache
from mixchat.kernels.threads import NativeFunction

# Increase it if kernels change. Then old measurements and machine code are not used.
KERNELS = 5
InstructionSet = Literal["avx512", "avx2"]
_NEEDED: dict[InstructionSet, tuple[str, ...]] = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma"),
}
LANES: dict[InstructionSet, int] = {"avx512": 16, "avx2": 8}  # fp32 numbers in a register
# On some CPUs LLVM would split vectors of 512 bits.
_FULL_WIDTH = "-prefer-256-bit"


@functools.cache
def instruction_set() -> InstructionSet | None:
    """Return the best instruction set that kernels are written for, or None if the CPU has none.

    `ATEN_CPU_CAPABILITY=avx2` (or `default`) in the environment limits it. On Windows, where no
    kernel was tried yet, there is none.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX512", "AVX2") or system.WINDOWS:
        return None
    has = {name: all(map(has_feature, needed)) for name, needed in _NEEDED.items()}
    if has["avx512"] and capability == "AVX512":
        return "avx512"
    return "avx2" if has["avx2"] else None


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


def kernels_available() -> bool:
    """Return whether this CPU can run kernels, which need AVX2."""
    return instruction_set() is not None


@functools.cache
def has_feature(name: str) -> bool:
    """Return whether the CPU has this feature, by LLVM's name."""
    return bool(llvm.get_host_cpu_features().get(name, False))


def multiplies_bf16() -> bool:
    """Return whether torch multiplies bf16 matrices at full speed here. Only x86 is examined."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    native = has_feature("avx512bf16") or has_feature("amx-bf16")
    return native and torch.backends.cpu.get_cpu_capability() == "AVX512"


def compile_module(module: Any, instructions: InstructionSet) -> Compiled:
    """Compile a module for this CPU, with no other instructions than these."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if instructions == "avx2":
        features.update({name: False for name in features if name.startswith("avx512")})
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=f"{features.flatten()},{_FULL_WIDTH}",
        opt=3,
        jit=True,
    )
    source = str(module)
    target = (machine.triple, llvm.get_host_cpu_name(), features.flatten(), llvm.llvm_version_info)
    cache = ObjectCache(source, f"{target} {KERNELS}")
    parsed = llvm.parse_assembly(source)
    code = cache.load()
    if code is None:
        parsed.verify()
        _optimize(parsed, machine)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.set_object_cache(lambda module, made: cache.save(made), lambda module: code)
    engine.finalize_object()
    return Compiled(engine)


def _optimize(parsed: Any, machine: Any) -> None:
    # LLVM's own choices cost registers.
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
