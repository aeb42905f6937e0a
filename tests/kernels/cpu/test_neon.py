"""Kernels for ARM: their machine code has the bits of x86 under qemu.

`test_quantized_matmul.py` runs the units for NEON with emulated instructions, on every x86 CPU.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llvmlite import ir
from matmul_tools import TYPES, random
from neon_tools import ArmModule, arm_code, can_emulate, run_under_qemu

from mixchat.kernels.cpu import (
    attention,
    convolution,
    delta_net,
    dense,
    gated_norm,
    pages,
    program,
    router,
    rows,
    trellis_encode,
)
from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu import quantized_matmul as kernel
from mixchat.kernels.cpu.compile import CPUS, LANES, InstructionSet, compiled_here, instruction_set
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.cpu.pages import PAGE, Bits, CacheShape
from mixchat.kernels.cpu.quantized_matmul import QuantizedMatrix
from mixchat.kernels.cpu.units import MANY

MODULES = (kernel, attention, convolution, delta_net, dense, pages, program, router, rows)
MODULES += (gated_norm, trellis_encode)
under_qemu = pytest.mark.skipif(
    instruction_set() in (None, "neon") or not can_emulate(),
    reason="no qemu-aarch64, no aarch64-linux-gnu-gcc, or no AVX2",
)

Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Let the kernels be compiled for a set of instructions, NEON for `run_under_qemu`."""
    compiler = compiling.compile_module

    def use(instructions: InstructionSet, *, dotprod: bool = True) -> None:
        if instructions == "neon":
            monkeypatch.setattr(compiling, "has_feature", lambda name: dotprod)
        how = ArmModule if instructions == "neon" else compiler
        monkeypatch.setattr(compiling, "compile_module", how)
        monkeypatch.setattr(compiling, "instruction_set", lambda: instructions)
        for module in MODULES:
            if hasattr(module, "instruction_set"):
                monkeypatch.setattr(module, "instruction_set", lambda: instructions)
            again = compiled_here(inspect.unwrap(module._compiled))
            monkeypatch.setattr(module, "_compiled", again)

    return use


@under_qemu
@pytest.mark.parametrize("tokens", [3, 21])
@pytest.mark.parametrize(
    ("name", "dotprod"), [*((name, True) for name in TYPES), ("trellis2", False)]
)
def test_products_with_codes_have_the_bits_of_x86(
    use: Use, tmp_path: Path, name: str, dotprod: bool, tokens: int
) -> None:
    kind = TYPES[name]
    own = CPUS[instruction_set() or "avx2"].multiplies_bytes
    if tokens >= MANY and kind.units.many and not own:
        pytest.skip("this CPU rounds many tokens otherwise")
    dtype = torch.bfloat16 if tokens == 3 else torch.float32
    matrix, bias = random(192, 256), random(1, 192, seed=2)[0]
    absmax, codes = kind.pack(*kind.codes(matrix.bfloat16()), 256)
    packed = QuantizedMatrix(codes, absmax, kind.level_table, (192, 256), kind.units, bias)
    x, out = random(tokens, 256, seed=1).to(dtype), torch.empty(tokens, 192, dtype=dtype)
    expected = kernel.quantized_matmul(x, packed)
    use("neon", dotprod=dotprod)
    steps = kernel.quantized_matmul_steps(x, packed, out)
    run_under_qemu(tmp_path, steps, codes, absmax, bias)
    assert torch.equal(out, expected)


@under_qemu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_have_the_bits_of_avx2(use: Use, tmp_path: Path, dtype: torch.dtype) -> None:
    x, weight, out = random(3, 256).to(dtype), random(256, seed=1).to(dtype), random(3, 256)
    use("avx2")
    expected = rows.rms_norm(x, weight, 1e-5)
    use("neon")
    out = torch.empty_like(x)
    run_under_qemu(tmp_path, [rows.rms_norm_step(x, weight, 1e-5, out)], weight)
    assert torch.equal(out, expected)


@under_qemu
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("latent_dim", [0, 32])
def test_attention_has_the_bits_of_avx2(
    use: Use, tmp_path: Path, bits: Bits, latent_dim: int
) -> None:
    groups = 1 if latent_dim else 2
    shape = CacheShape(8, groups, 48, bits, latent_dim)
    page = torch.zeros(shape.page_bytes, dtype=torch.uint8)
    addresses = torch.tensor([page.data_ptr()])
    keys, values, queries = (
        random(20, heads, columns, seed=seed).bfloat16()
        for seed, (heads, columns) in enumerate(
            ((groups, shape.key_dim), (groups, shape.value_dim), (8, 48))
        )
    )
    use("avx2")
    pages.store(shape, addresses, 0, keys, values)
    expected = attention.attend(shape, addresses, 0, queries, 7)
    use("neon")
    out = torch.empty_like(expected)
    steps = attention.attend_steps(shape, queries, out, PAGE)
    for step in steps:
        attention.set_window(shape, step, 7, None)
        step.set(pages=addresses.data_ptr(), past=0, splits=1)
    sinks = attention._no_sinks(shape.heads)
    run_under_qemu(tmp_path, steps, page, addresses, sinks)
    assert torch.equal(out, expected)


@under_qemu
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gated", [False, True])
def test_convolutions_have_the_bits_of_avx2(
    use: Use, tmp_path: Path, tokens: int, gated: bool
) -> None:
    weight, before, after = random(48, 4), random(3, 48, seed=1), torch.empty(3, 48)
    convolution, x = Convolution(weight, gated=gated), random(tokens, 144, seed=2).bfloat16()
    x = x if gated else x[:, :48].contiguous()
    use("avx2")
    expected, expected_state = convolution(x, before, after), after.clone()
    use("neon")
    out = torch.empty_like(expected.contiguous())
    step = convolution.step(x, out)
    step.set(before=before.data_ptr(), after=after.data_ptr())
    run_under_qemu(tmp_path, [step], before, after)
    assert torch.equal(out, expected)
    assert torch.equal(after, expected_state)


@under_qemu
@pytest.mark.parametrize("tokens", [1, 5])
def test_states_and_their_norm_have_the_bits_of_avx2(use: Use, tmp_path: Path, tokens: int) -> None:
    shape = DeltaNetShape(2, 6, 32, 64)
    rule = DeltaRule(shape, random(6), random(6, seed=1))
    qkv, ba = random(tokens, shape.channels, seed=2), random(tokens, 12, seed=3).bfloat16()
    norm, gate = GatedNorm(random(64).bfloat16(), 1e-6), random(tokens, 384, seed=4).bfloat16()
    before, after = random(*shape.state_shape, seed=5), torch.empty(shape.state_shape)
    use("avx2")
    expected = rule(qkv.clone(), ba, before, after)
    expected_norm, expected_state = norm(expected, gate), after.clone()
    use("neon")
    out, normed = torch.empty_like(expected), torch.empty_like(expected)
    prepare, recur = rule.steps(qkv, ba, out)
    recur.set(before=before.data_ptr(), after=after.data_ptr())
    steps = [prepare, recur, norm.step(out, gate, normed)]
    run_under_qemu(tmp_path, steps, before, after)
    assert torch.equal(out, expected)
    assert torch.equal(after, expected_state)
    assert torch.equal(normed, expected_norm)


def test_arm_gets_its_own_instructions_for_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them LLVM would need a dozen instructions for four products."""
    codes: list[str] = []
    monkeypatch.setattr(compiling, "has_feature", lambda name: True)
    four, trellis = TYPES["nf4"].units, TYPES["trellis2"].units
    for unit in (four.words["neon"], four.many["neon"][0], trellis.words["neon"]):
        module = ir.Module()
        inspect.unwrap(kernel._compiled)(module, LANES["neon"], unit, True, False)
        codes.append(arm_code(module, as_text=True))
    words, of_bytes, of_trellis = codes
    assert all(name in words for name in ("smlal2", "tbl", "trn2"))
    assert "sdot" not in words
    assert all(name in code for code in (of_bytes, of_trellis) for name in ("sdot", "tbl"))


def test_a_program_pauses_with_an_instruction_of_arm(use: Use) -> None:
    use("neon")
    module: Any = program._compiled()
    assert module.function("walk").code.startswith(b"\x7fELF")
