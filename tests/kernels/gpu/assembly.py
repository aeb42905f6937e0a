"""Compiles the kernels for cards that are not here, just as they are launched, and reads the code.

    python tests/kernels/gpu/assembly.py                     all kernels for all cards, as a table
    python tests/kernels/gpu/assembly.py --cards sm_86 --only product --json
    python tests/kernels/gpu/assembly.py --cards sm_86 sm_90 --only product "^attend"

A call of `CALLS` calls the launching functions with tensors that have no memory. What they launch
is recorded and compiled, with the arguments specialized as Triton does at a launch. To add kernels,
add a function to `CALLS`. Triton must not interpret, so this runs in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixchat.base import gpu
from mixchat.kernels.cpu.router import Router
from mixchat.kernels.gpu import codes, launch
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.convolution import gated_convolution
from mixchat.kernels.gpu.delta_net import DeltaNetWeights, delta_net, delta_rule
from mixchat.kernels.gpu.dense import dense_product
from mixchat.kernels.gpu.dequantize import dequantize
from mixchat.kernels.gpu.experts import ExpertForm, ExpertMatrix, Levels, experts_down, experts_up
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.kv_store import KVTensors, store
from mixchat.kernels.gpu.latents import latent_heads
from mixchat.kernels.gpu.norm import add_norm
from mixchat.kernels.gpu.product import Form, Matrix, head_products, product
from mixchat.kernels.gpu.route import route

BF16, FP32, INT32, UINT8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KINDS = {
    BF16: "bf16",
    torch.float16: "fp16",
    FP32: "fp32",
    UINT8: "u8",
    torch.int8: "i8",
    INT32: "i32",
    torch.int64: "i64",
}


class Card(NamedTuple):
    """A kind of GPU. Threads and programs are those that a multiprocessor holds at most."""

    target: GPUTarget
    threads: int
    programs: int
    registers: int = 65536  # of 32 bits, of a multiprocessor; on AMD, of a thread's share


CARDS = {
    "sm_75": Card(GPUTarget("cuda", 75, 32), 1024, 16),
    "sm_80": Card(GPUTarget("cuda", 80, 32), 2048, 32),
    "sm_86": Card(GPUTarget("cuda", 86, 32), 1536, 16),
    "sm_89": Card(GPUTarget("cuda", 89, 32), 1536, 24),
    "sm_90": Card(GPUTarget("cuda", 90, 32), 2048, 32),
    "sm_120": Card(GPUTarget("cuda", 120, 32), 1536, 24),
    # Threads of a SIMD, and the registers that it has for each of a warp's.
    "gfx1100": Card(GPUTarget("hip", "gfx1100", 32), 16 * 32, 16, 1536),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 8 * 64, 16, 512),
}


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def form_of(quant_type: str, rows: int, columns: int) -> Form:
    band = codes.TILES[quant_type].band
    return Form(quant_type, rows, -(-rows // band) * band, columns)


def levels_of(quant_type: str) -> torch.Tensor | None:
    return empty(64, dtype=FP32) if codes.TILES[quant_type].bits <= 4 else None


def scale_size(quant_type: str) -> int:
    return 1 if quant_type == "mxfp4" or quant_type.startswith("trellis") else 2


def matrix_of(quant_type: str, rows: int, columns: int, *, bias: bool = False) -> Matrix:
    form = form_of(quant_type, rows, columns)
    added = empty(rows, dtype=FP32) if bias else None
    if quant_type == "none":
        return Matrix(form, empty(rows, columns), bias=added)
    scale = UINT8 if scale_size(quant_type) == 1 else BF16
    return Matrix(form, empty(1, dtype=UINT8), empty(1, dtype=scale), levels_of(quant_type), added)


def part_of(
    quant_type: str, rows: int, columns: int, start: int, bias: bool
) -> tuple[ExpertMatrix, int]:
    form = form_of(quant_type, rows, columns)
    scales = 0
    if quant_type != "none":
        scales = form.stored_rows * columns // form.tile.block * scale_size(quant_type)
    bias_at = start + scales + form.stored_rows * columns * form.tile.bits // 8
    return ExpertMatrix(form, start + scales, start, bias_at if bias else None), bias_at + 4 * rows


def call_product(quant_type: str, rows: int, columns: int, n: int = 1, **options: Any) -> None:
    product(empty(n, columns), matrix_of(quant_type, rows, columns, **options))


def call_experts(
    quant_type: str, width: int, inner: int, choices: int, *, limit: float | None = None
) -> None:
    bias = limit is not None
    up, end = part_of(quant_type, 2 * inner, width, 0, bias)
    down, _ = part_of(quant_type, width, inner, end, bias)
    form, levels = ExpertForm(up, down, limit), Levels(*[levels_of(quant_type)] * 2)
    selected, addresses = empty(choices, dtype=INT32), empty(128, dtype=torch.int64)
    gated = experts_up(empty(width), selected, addresses, form, levels)
    experts_down(gated, selected, empty(choices, dtype=FP32), addresses, form, levels)


def call_dequantize(quant_type: str, rows: int, columns: int) -> None:
    dequantize(matrix_of(quant_type, rows, columns), empty(rows, columns))


def call_route(experts: int, columns: int, choices: int, **options: Any) -> None:
    router = Router(empty(experts, columns), choices, **options)
    logits, weights = empty(experts, dtype=FP32), empty(choices, dtype=FP32)
    counter, selected = empty(1, dtype=INT32), empty(choices, dtype=INT32)
    route(empty(columns), router, logits, selected, weights, counter)


def call_dense(rows: int, columns: int) -> None:
    dense_product(empty(columns), empty(rows, columns), empty(rows))


def call_add_norm(columns: int, partials: int) -> None:
    added, counter = empty(partials, columns, dtype=FP32), empty(1, dtype=INT32)
    add_norm(empty(columns), added, empty(columns), empty(columns), 1e-5, counter)


def kv_tensors(groups: int, width: int, bits: int) -> KVTensors:
    numbers = empty(2, groups, 2**15, width, dtype=torch.int8 if bits == 8 else BF16)
    return KVTensors(numbers, empty(2, groups, 2**15, dtype=FP32) if bits == 8 else None)


def call_heads(
    count: int, groups: int, width: int, norms: Sequence[int], bits: int = 16, gated: bool = False
) -> None:
    """Norms are named by the sizes of their weights."""
    qkv = empty(4, (count * (2 if gated else 1) + 2 * groups) * width, dtype=FP32)
    rope = empty(4096, width), empty(4096, width)
    own, past = [empty(size) for size in norms], empty(1, dtype=INT32)
    tensors = kv_tensors(groups, width, bits)
    queries, gates = empty(count, width), empty(count, width) if gated else None
    heads(qkv, queries, tensors, past, rope, own, 1e-6, gates=gates)


def call_delta_net(keys: int, values: int, size: int) -> None:
    """All heads have 128 columns."""
    channels, out = (2 * keys + values) * 128, values * 128
    small = empty(2 * values, size), empty(4, channels, dtype=FP32)
    rates = (empty(values, dtype=FP32) for _ in range(2))
    weights = DeltaNetWeights(*small, *rates, empty(128), 1e-6)
    addresses, counters = empty(4, dtype=torch.int64), empty(values, dtype=INT32)
    projected, kept = empty(1, channels + out, dtype=FP32), (addresses, (values, 4, 128, 32))
    delta_net(empty(size), projected, weights, *kept, empty(out), empty(out), counters)


def call_delta_rule(keys: int, values: int) -> None:
    qkv, gates = (
        empty(512, (2 * keys + values) * 128, dtype=FP32),
        empty(512, values, 2, dtype=FP32),
    )
    state = empty(values, 4, 128, 32, dtype=FP32)
    delta_rule(qkv, gates, state, state, BF16)


def call_convolution(channels: int) -> None:
    projected, weight = empty(1, 3 * channels, dtype=FP32), empty(3, channels, dtype=FP32)
    gated_convolution(projected, weight, empty(2, dtype=torch.int64), empty(channels))


def call_store(groups: int, width: int, bits: int) -> None:
    rows, past = empty(512, groups, width), empty(1, dtype=INT32)
    store(kv_tensors(groups, width, bits), rows, rows, past)


def call_head_products(quant_type: str, heads: int, rows: int, columns: int) -> None:
    form, levels = form_of(quant_type, rows, columns), levels_of(quant_type)
    x, addresses = empty(heads, columns), empty(2, heads, dtype=torch.int64)
    head_products(x, addresses, form, levels, empty(heads, rows))


def call_latent_heads(heads: int, width: int) -> None:
    """Of a latent of 768 columns for queries, 512 for keys, and 64 that rotate."""
    latents, counter = empty(4, 768 + 512 + 64, dtype=FP32), empty(1, dtype=INT32)
    query = latents[:, :768], empty(768), empty(768)
    add_norm(empty(768), *query, 1e-6, counter, adds=False)
    queries, rope = empty(1, heads * (width + 64), dtype=FP32), (empty(4096, 64), empty(4096, 64))
    tensors = KVTensors(empty(1, 1, 2**15, 512), None, empty(1, 2**15, 64))
    told = empty(512), 1e-6, rope, empty(1, dtype=INT32)
    latent_heads(queries, latents, *told, tensors, empty(heads, width), empty(heads, 576))


def call_latents(heads: int, tokens: int, bits: int) -> None:
    """Attend to latents of 512 numbers, and 64 that rotate."""
    shape, dtype = (1, 2**15), torch.int8 if bits == 8 else BF16
    scales = empty(2, *shape, dtype=FP32) if bits == 8 else None
    tensors = KVTensors(empty(1, *shape, 512, dtype=dtype), scales, empty(*shape, 64, dtype=dtype))
    parts = Parts.for_tokens(tokens, heads, tensors, None)
    queries, out = empty(tokens, heads, 576), empty(tokens, heads, 512)
    attend(queries, tensors, empty(1, dtype=INT32), out, parts, scale=576**-0.5)


@dataclass(frozen=True)
class Attention:
    """The attention of some tokens, in a model's shape."""

    heads: int
    groups: int
    width: int
    tokens: int = 1
    window: int | None = None
    sinks: bool = False
    gating: Literal["number", "head"] | None = None
    bits: int = 16

    def __call__(self) -> None:
        cache = kv_tensors(self.groups, self.width, self.bits)
        queries = empty(self.tokens, self.heads, self.width)
        parts = Parts.for_tokens(self.tokens, self.heads, cache, self.window)
        sinks = empty(self.heads, dtype=FP32) if self.sinks else None
        gated = queries.shape if self.gating == "number" else queries.shape[:2]
        gates, past = empty(*gated) if self.gating else None, empty(1, dtype=INT32)
        attend(queries, cache, past, torch.empty_like(queries), parts, self.window, sinks, gates)


TYPES = [name for name in codes.TILES if name != "none32"]
CODED = [name for name in TYPES if name != "none"]
CALLS: dict[str, Callable[[], None]] = {
    **{f"product {name}": partial(call_product, name, 5120, 2048) for name in TYPES},
    **{f"mixtral {name}": partial(call_experts, name, 4096, 14336, 2) for name in TYPES},
    "qwen3 nf4": partial(call_experts, "nf4", 2048, 768, 8),
    "gpt-oss mxfp4": partial(call_experts, "mxfp4", 2880, 2880, 4, limit=7.0),
    "gpt-oss qkv int8": partial(call_product, "int8", 5120, 2880, bias=True),
    "qwen3 head int8": partial(call_product, "int8", 151936, 2048),
    "two rows nf4": partial(call_product, "nf4", 5120, 2048, 2),
    "two rows int8": partial(call_product, "int8", 5120, 2048, 2),
    **{f"dequantize {name}": partial(call_dequantize, name, 5120, 2048) for name in CODED},
    "route mixtral": partial(call_route, 8, 4096, 2),
    "route qwen3": partial(call_route, 128, 2048, 8),
    "route glm4": partial(
        call_route,
        128,
        4096,
        8,
        scoring="sigmoid",
        correction=empty(128, dtype=FP32),
        scaling=2.5,
    ),
    "dense_product laguna": partial(call_dense, 64, 2048),
    "attend laguna": Attention(64, 8, 128, window=512, gating="head"),
    "add_norm mixtral": partial(call_add_norm, 4096, 8),
    "add_norm of few gpt-oss": partial(call_add_norm, 2880, 4),
    "heads qwen3": partial(call_heads, 32, 4, 128, [128, 128]),
    "heads olmoe in 8 bits": partial(call_heads, 16, 16, 128, [2048, 2048], bits=8),
    "heads qwen3-next": partial(call_heads, 16, 2, 256, [256, 256], gated=True),
    "delta_net qwen3.6": partial(call_delta_net, 16, 32, 2048),
    "delta_rule qwen3.6": partial(call_delta_rule, 16, 32),
    "gated_convolution lfm2": partial(call_convolution, 2048),
    "store qwen3": partial(call_store, 4, 128, 16),
    "store qwen3 in 8 bits": partial(call_store, 4, 128, 8),
    "attend qwen3": Attention(32, 4, 128),
    "attend qwen3 in 8 bits": Attention(32, 4, 128, bits=8),
    "attend gpt-oss": Attention(64, 8, 64, window=128, sinks=True),
    "attend gpt-oss in 8 bits": Attention(64, 8, 64, bits=8, sinks=True),
    "attend qwen3-next": Attention(16, 2, 256, gating="number"),
    "attend heads of 80 columns": Attention(32, 8, 80),
    "latent_heads glm-4.7-flash": partial(call_latent_heads, 20, 192),
    **{f"head_products {name}": partial(call_head_products, name, 20, 512, 192) for name in TYPES},
    "head_products of values int8": partial(call_head_products, "int8", 20, 256, 512),
    "attend glm-4.7-flash": partial(call_latents, 20, 1, 16),
    "attend glm-4.7-flash in 8 bits": partial(call_latents, 20, 1, 8),
    "prompt attend glm-4.7-flash": partial(call_latents, 20, 512, 16),
    "prompt attend qwen3": Attention(32, 4, 128, tokens=512),
    "prompt attend qwen3 in 8 bits": Attention(32, 4, 128, tokens=512, bits=8),
    "prompt attend gpt-oss": Attention(64, 8, 64, tokens=512, window=128, sinks=True),
}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def launches_of(call: Callable[[], None], card: Card) -> list[Launch]:
    """Return what a call launches on a card."""
    recorded: list[Launch] = []
    target = card.target
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start", lambda *parts: recorded.append(Launch(*parts)))
        patch.setattr(codes, "lanes", lambda: target.warp_size)
        patch.setattr(gpu, "is_amd", lambda: target.backend == "hip")
        patch.setattr(gpu, "has_bf16", lambda device: target.arch != 75)
        call()
    return recorded


def compiled(started: Launch, card: Card) -> Any:
    """Compile a launch, specialized for its arguments."""
    kinds: dict[str, str] = {}
    attributes, constants = {}, {}
    parameters = started.kernel.params
    for index, parameter in enumerate(parameters):
        value = started.constants.get(parameter.name)
        if index < len(started.arguments):
            value = started.arguments[index]
        kind, is_aligned = kind_of(value, parameter)
        kinds[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    names = {parameter.name for parameter in parameters}
    options = {name: value for name, value in started.constants.items() if name not in names}
    source = ASTSource(started.kernel, kinds, constants, attributes)
    return triton.compile(source, target=card.target, options=options)


def kind_of(value: Any, parameter: Any) -> tuple[str, bool]:
    """Return the type of an argument, and whether Triton knows that 16 divides it."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.itemsize
        return f"*{_KINDS[value.dtype]}", offset % 16 == 0
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    specialized = not parameter.do_not_specialize
    if value == 1 and specialized:
        return "constexpr", False
    return "i32", specialized and value % 16 == 0


@dataclass(frozen=True)
class Row:
    """A kernel on a card. Loads are instructions. Wide ones have 128 bits, narrow ones one byte."""

    call: str
    kernel: str
    card: str
    programs: int
    threads: int
    registers: int
    spills: int
    wide_loads: int
    narrow_loads: int
    shared_in_loop: int  # instructions for shared memory in the innermost loop
    loop: int  # instructions of the loop
    loop_by_unit: dict[str, int]
    shared: int  # bytes of shared memory of a program
    occupancy: float  # the part of a card's threads for which there are registers


def row_of(name: str, started: Launch, card_name: str) -> Row:
    card = CARDS[card_name]
    made = compiled(started, card)
    threads = made.metadata.num_warps * card.target.warp_size
    is_nvidia = card.target.backend == "cuda"
    registers, spills, code = _nvidia(made.asm["cubin"]) if is_nvidia else _amd(made)
    loop = loop_of(code)
    shared = re.compile(r"(LDS|STS|LDSM|BAR)\b|ds_|s_barrier")
    wide = r"LDG(STS)?\.[\w.]*128|global_load_(dwordx4|b128)"
    narrow = r"LDG\.[\w.]*[US]8\b|global_load_(ubyte|sbyte|u8|i8)"
    # On AMD, a permutation of a warp's registers is called like an access to shared memory.
    in_loop = [name for name in loop if shared.match(name) and "permute" not in name]
    return Row(
        call=name,
        kernel=started.kernel.fn.__name__,
        card=card_name,
        programs=math.prod(started.grid),
        threads=threads,
        registers=registers,
        spills=spills,
        wide_loads=sum(bool(re.match(wide, name)) for name in code),
        narrow_loads=sum(bool(re.match(narrow, name)) for name in code),
        shared_in_loop=len(in_loop),
        loop=len(loop),
        loop_by_unit=dict(collections.Counter(name.split(".")[0] for name in loop)),
        shared=made.metadata.shared,
        occupancy=round(occupancy_of(card, registers, threads), 2),
    )


def occupancy_of(card: Card, registers: int, threads: int) -> float:
    if card.target.backend == "hip":
        granule = 24 if card.target.warp_size == 32 else 8
        warps = card.registers // (-(-registers // granule) * granule)
        return min(warps * card.target.warp_size, card.threads) / card.threads
    programs = card.registers // (-(-registers // 8) * 8 * threads)
    programs = min(programs, card.programs, card.threads // threads)
    return programs * threads / card.threads


@functools.cache  # several calls share a kernel
def _nvidia(cubin: bytes) -> tuple[int, int, list[str]]:
    """Return registers, spills, and the instructions' names, with jumps as `_lines` has them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)")
    names = list(_lines(code, instruction, r"(\.L\w+):", r"BRA", r"`\((\.L\w+)\)"))
    spills = sum(name.startswith(("STL", "LDL")) for name in names)
    return int(found[1]), spills, names


def _amd(made: Any) -> tuple[int, int, list[str]]:
    text = made.asm["amdgcn"]
    numbers = [
        int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    ]
    code = text[: text.index(".amdhsa_kernel")]
    instruction = re.compile(r"\s+([a-z]\w+)(.*)")
    names = list(_lines(code, instruction, r"(\.LBB\w+):", r"s_c?branch", r"(\.LBB\w+)"))
    return numbers[0], numbers[1] + numbers[2], names


def _lines(code: str, instruction: Any, label: str, jump: str, target: str) -> Iterator[str]:
    """Yield the names of instructions, ":label" for a label, and "jump>label" for a jump."""
    for line in code.splitlines():
        if found := re.match(label, line):
            yield f":{found[1]}"
        elif found := instruction.match(line):
            goal = re.search(target, found[2])
            yield f"jump>{goal[1]}" if re.match(jump, found[1]) and goal else found[1]


def loop_of(code: list[str]) -> list[str]:
    """Return the instructions of the largest loop without a loop in it."""
    labels: dict[str, int] = {}
    loops = []
    for index, name in enumerate(code):
        if name.startswith(":"):
            labels[name[1:]] = index
        elif name.startswith("jump>") and name[5:] in labels:
            loops.append(range(labels[name[5:]], index))
    innermost = [
        loop
        for loop in loops
        if not any(loop.start < other.start and other.stop < loop.stop for other in loops)
    ]
    bodies = (
        [name for name in code[loop.start : loop.stop] if not name.startswith((":", "jump>"))]
        for loop in innermost
    )
    return max(bodies, key=len, default=[])


def rows_of(cards: list[str], patterns: list[str]) -> Iterator[Row]:
    """Yield a row for each card and each kernel of the calls whose names match its pattern."""
    for card, pattern in zip(cards, patterns, strict=True):
        calls = {name: call for name, call in CALLS.items() if re.search(pattern, name)}
        for name, call in calls.items():
            for started in launches_of(call, CARDS[card]):
                yield row_of(name, started, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    only = "a regular expression for names of calls: one for each card, or one for all"
    parser.add_argument("--only", nargs="+", default=[""], help=only)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    columns = ("call", "kernel", "card", "programs", "threads", "registers", "spills")
    columns += ("wide_loads", "narrow_loads", "shared", "shared_in_loop", "loop", "occupancy")
    patterns = arguments.only * (len(arguments.cards) if len(arguments.only) == 1 else 1)
    for row in rows_of(arguments.cards, patterns):
        rows.append(asdict(row))
        if not arguments.json:
            if len(rows) == 1:
                print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
            print("| " + " | ".join(str(rows[-1][name]) for name in columns) + " |", flush=True)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET"), "Triton must not interpret here"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
