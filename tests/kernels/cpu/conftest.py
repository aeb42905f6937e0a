"""The ways in which a CPU may compute."""

import pytest

from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.compile import InstructionSet, instruction_set


@pytest.fixture(params=["kernel", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute by the kernel, or by torch as on machines without kernels."""
    if request.param == "torch":
        monkeypatch.setattr(rows, "instruction_set", lambda: None)
    elif instruction_set() is None:
        pytest.skip("kernels need AVX2 or NEON")


@pytest.fixture(params=["avx512", "avx2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    """Each set that this CPU has, instead of the best."""
    if instruction_set() is None or (request.param, instruction_set()) == ("avx512", "avx2"):
        pytest.skip(f"the CPU has no {request.param}")
    monkeypatch.setattr(compiling, "instruction_set", lambda: request.param)
    return request.param
