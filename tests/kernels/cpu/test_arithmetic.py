import ctypes
import math

import pytest
from llvmlite import ir

from mixchat.kernels.cpu.arithmetic import exponential
from mixchat.kernels.cpu.compile import compile_module, instruction_set
from mixchat.kernels.cpu.emit import Function, f32, vector

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")


@pytest.mark.parametrize("kind", [f32, vector(f32, 8)])
def test_the_exponential_is_that_of_the_library(kind):
    module = ir.Module("test")
    function = Function(module, "tested")
    function.pointer.store(exponential(function, function.pointer.load(kind)))
    function.finish()
    compiled = compile_module(lambda: str(module), instruction_set() or "avx2", str(module))
    tested = compiled.function("tested")
    numbers = [0.0, -1e-9, -0.3465, -0.5, -1.0, -10.0, -86.9, -50.3]
    numbers += [-88.0, -1e3, -2e38, -0.7, -3.3, -20.1, -5.5, -2.25]
    for start in range(0, len(numbers), 8):
        eight = numbers[start : start + 8]
        for one in [eight] if kind != f32 else [[number] for number in eight]:
            space = (ctypes.c_int64 * 4)()
            floats = (ctypes.c_float * 8).from_buffer(space)
            floats[: len(one)] = one
            tested.run(space, 1)
            for given, result in zip(one, floats, strict=False):
                exact = math.exp(ctypes.c_float(given).value)
                exact = exact if given > -87.3 else 0.0
                assert result == pytest.approx(exact, rel=1e-6, abs=0)
