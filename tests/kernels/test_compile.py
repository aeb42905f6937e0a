import os
import subprocess
import sys

import pytest

from mixchat.kernels.compile import instruction_set


@pytest.mark.parametrize(("capability", "found"), [("avx2", "avx2"), ("default", "None")])
@pytest.mark.skipif(instruction_set() is None, reason="the CPU has neither")
def test_the_environment_asks_for_less_than_there_is(capability: str, found: str) -> None:
    """With the variable that torch's own kernels heed."""
    code = "from mixchat.kernels.compile import instruction_set; print(instruction_set())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == found


def test_a_cpu_without_avx2_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixchat.kernels.compile.has_feature", lambda name: name == "neon")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert instruction_set.__wrapped__() is None
