import os
import subprocess
import sys

import pytest

from mixchat.base.errors import MissingDependencyError
from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu.compile import has_feature, instruction_set, multiplies_bf16


@pytest.mark.parametrize(("capability", "found"), [("avx2", "avx2"), ("default", "None")])
@pytest.mark.skipif(instruction_set() in (None, "neon"), reason="the CPU has neither")
def test_the_environment_asks_for_less_than_there_is(capability, found):
    """With the variable that torch's own kernels heed."""
    code = "from mixchat.kernels.cpu.compile import instruction_set; print(instruction_set())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == found


def test_a_cpu_without_avx2_has_no_kernels(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("mixchat.kernels.cpu.compile.has_feature", lambda name: name == "neon")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert instruction_set.__wrapped__() is None


@pytest.mark.parametrize(
    ("machine", "features", "asked", "found"),
    [
        ("aarch64", {"neon": True}, "", "neon"),
        ("aarch64", {"neon": False}, "", None),
        ("aarch64", {"neon": True}, "default", None),
        ("arm64", {}, "", "neon"),  # Apple's, of which LLVM finds no features
        ("x86_64", {}, "", None),
    ],
)
def test_an_arm_cpu_needs_neon(machine, features, asked, found, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
    monkeypatch.setattr("mixchat.kernels.cpu.compile.has_feature", has_feature.__wrapped__)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
    assert instruction_set.__wrapped__() == found


@pytest.mark.parametrize(
    ("machine", "features", "capability", "fast"),
    [
        ("x86_64", {"avx2", "avx512f"}, "AVX512", False),
        ("x86_64", {"avx2", "avx512f", "avx512bf16"}, "AVX512", True),
        ("AMD64", {"avx2", "amx-bf16"}, "AVX512", True),
        ("x86_64", {"avx2", "avx512bf16"}, "AVX2", False),  # asked for less than there is
        ("aarch64", set(), "DEFAULT", True),
    ],
)
def test_which_cpus_multiply_in_bf16(machine, features, capability, fast, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("mixchat.kernels.cpu.compile.has_feature", lambda name: name in features)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert multiplies_bf16() is fast


@pytest.mark.parametrize(
    ("machine", "features", "message", "hint"),
    [
        ("x86_64", {"fma"}, "this CPU has no AVX2, which", "Use another machine"),
        ("x86_64", set(), "this CPU has no AVX2 and no FMA, which", "--server"),
        ("aarch64", set(), "this CPU has no NEON, which", "Use another machine"),
        ("x86_64", {"avx2", "fma"}, "switches AVX2 off", "Unset ATEN_CPU_CAPABILITY"),
    ],
)
def test_a_cpu_without_kernels_is_refused_in_one_line(
    machine, features, message, hint, monkeypatch
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(compiling, "has_feature", lambda name: name in features)
    monkeypatch.setattr(compiling, "instruction_set", lambda: None)
    with pytest.raises(MissingDependencyError, match=message) as caught:
        compiling.require_kernels()
    assert hint in str(caught.value.hint)
