"""Counts what a token launches on a GPU, how often the host waits, and the bytes of weights read.

    python tests/benchmarks/gpu_budget.py [--json]

Launches, kernels and waits are counted on a GPU on paper (tests/tools/paper_gpu.py), with a tiny
model of each type. `resident` is the share of the experts in VRAM. If all are there, launches (a
graph is one) and waits are those of a token. Otherwise they are those of one more layer, beside
the copy of what the CPU computed. Kernels are those of one more layer. Bytes are counted in the
kernels themselves, which Triton's interpreter runs with Mixtral's shapes for the first rows of each
matrix: what a token reads, as a multiple of the weights that it needs. What several threads of a
program read counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "tools"), str(TESTS / "loading")]

import numpy as np  # noqa: E402
import paper_gpu  # noqa: E402
import torch  # noqa: E402
from paper_runtime import RUNTIME  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from mixchat.base.options import LoadOptions  # noqa: E402
from mixchat.base.quantities import MemoryBudget  # noqa: E402
from mixchat.bench.synthetic import write_random  # noqa: E402
from mixchat.install.known_models import KNOWN  # noqa: E402
from mixchat.kernels.gpu import launch  # noqa: E402
from mixchat.kernels.gpu.experts import experts_down, experts_up  # noqa: E402
from mixchat.kernels.gpu.product import product  # noqa: E402
from mixchat.loading.loader import load_engine  # noqa: E402
from mixchat.planning.fitting import FreeMemory, fit_model  # noqa: E402
from mixchat.weights.families.read_config import read_config  # noqa: E402
from mixchat.weights.format.blueprint import Blueprint, Quantization  # noqa: E402
from mixchat.weights.format.gpu_expert import expert_form  # noqa: E402
from mixchat.weights.matrix.gpu_linear import build_on_gpu  # noqa: E402
from mixchat.weights.matrix.linear import TYPES  # noqa: E402
from mixchat.weights.matrix.quant_type import QuantType  # noqa: E402

EXPERTS, CHOICES = 8, 2
TINY = {
    "model_type": "mixtral",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
# Its layers have a state, and a shared expert with a gate.
TINY_STATES = TINY | {
    "model_type": "qwen3_next",
    "num_experts": EXPERTS,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
TINY_LATENTS = TINY | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 0,
}
TINY_CONVOLUTIONS = TINY | {
    "model_type": "lfm2_moe",
    "num_experts": EXPERTS,
    "moe_intermediate_size": 128,
    "num_dense_layers": 0,
    "layer_types": ["conv", "conv"],
}
# Norms of outputs, and a dense part beside the experts.
TINY_NORMS = TINY | {
    "model_type": "gemma4",
    "num_experts": EXPERTS,
    "top_k_experts": CHOICES,
    "moe_intermediate_size": 128,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CPU = torch.device("cpu")
_SECTOR = 32  # bytes that a GPU reads from its memory at least


@dataclass(frozen=True)
class Row:
    """The costs of a token with one type of codes and a share of the experts in VRAM."""

    type: QuantType
    resident: float
    launches: int
    kernels_a_layer: int
    syncs: int
    bytes_of_weights: float = 0.0


def rows() -> Iterator[Row]:
    """Yield the rows of all types."""
    for name in TYPES:
        read = bytes_read(name)
        for resident in (1.0, 0.5):
            yield replace(counted(name, resident), bytes_of_weights=read)


def blueprint_of(quant_type: QuantType, config: dict[str, Any]) -> Blueprint:
    """Return a model with experts of a type, or attention and head if it is only for these."""
    form = Quantization(attention="int8", head="int8")
    if TYPES[quant_type].for_experts:
        form = replace(form, quant_type=quant_type)
    else:
        form = replace(form, attention=quant_type, head=quant_type)
    return Blueprint(read_config(config), form)


def of_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a config with so many layers."""
    types = {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
    return config | types | {"num_hidden_layers": layers}


def counted(quant_type: QuantType, resident: float, config: dict[str, Any] = TINY) -> Row:
    """Return what a token costs, or one more layer if not all experts are in VRAM."""
    one, two = (_token(quant_type, resident, config, layers) for layers in (1, 2))
    launches, kernels, syncs = (second - first for first, second in zip(one, two, strict=True))
    if resident == 1:
        launches, _, syncs = two
    return Row(quant_type, resident, launches, kernels, syncs)


def _token(
    quant_type: QuantType, resident: float, config: dict[str, Any], layers: int
) -> tuple[int, int, int]:
    """Return the launches, kernels and waits of a token of a tiny model."""
    config = of_layers(config, layers)
    blueprint = blueprint_of(quant_type, config)
    with paper_gpu.in_place_of_cuda(), tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        write_random(directory, config, blueprint)
        options = LoadOptions(context_size=64)
        demand = fit_model(blueprint, FreeMemory(10**12, 10**12), options).demand
        held = int(resident * demand.experts)
        # A prompt's experts pass through two more slots.
        slots = held + (0 if held == demand.experts else 2)
        vram = demand.beside_experts + slots * demand.expert
        options = replace(options, device_memory=(MemoryBudget(size=vram),), device="paper")
        engine = load_engine(directory, options)
        forward, cache = engine.passes.model.forward, engine.held()[1]
        with torch.inference_mode():
            forward(torch.arange(16), cache)
            while engine.experts.is_filling:
                pass
            forward(torch.tensor([3]), cache)
            misses = engine.experts.stats.misses
            RUNTIME.waits = RUNTIME.launches = RUNTIME.kernels = 0
            forward(torch.tensor([5]), cache)
        missing = {key.layer for key in (engine.experts.stats.misses - misses)}
        counts = RUNTIME.launches - len(missing), RUNTIME.kernels, RUNTIME.waits
        engine.close()
    return counts


def bytes_read(quant_type: QuantType) -> float:
    """Return the bytes that kernels read of Mixtral's matrices, as a multiple of their size."""
    blueprint = blueprint_of(quant_type, KNOWN["instruct"].config)
    if TYPES[quant_type].for_experts:
        spec = blueprint.expert_of(0)
        form, levels = expert_form(spec, CPU)
        block = torch.zeros(spec.stride, dtype=torch.uint8)
        table = torch.tensor([block.data_ptr()])
        selected, weights = torch.zeros(1, dtype=torch.int32), torch.ones(1)
        x = torch.zeros(spec.gate_up.columns, dtype=torch.bfloat16)
        gated = torch.zeros(1, spec.down.columns, dtype=torch.bfloat16)
        calls = [
            (lambda: experts_up(x, selected, table, form, levels), spec.gate_up),
            (lambda: experts_down(gated, selected, weights, table, form, levels), spec.down),
        ]
        memory = [block]
    else:
        spec = blueprint.mixer(0).matrices["qkv_proj"]
        memory = [torch.zeros(tensor.nbytes, dtype=torch.uint8) for tensor in spec.tensors]
        parts = zip(memory, spec.tensors, strict=True)
        linear = build_on_gpu(spec, [part.view(t.dtype).view(t.shape) for part, t in parts])
        assert linear is not None
        x = torch.zeros(1, spec.columns, dtype=torch.bfloat16)
        calls = [(lambda: product(x, linear.matrix), spec)]
    read = needed = 0.0
    for call, matrix in calls:
        with first_rows_alone() as programs, sectors_read(memory) as total:
            call()
        needed += sum(tensor.nbytes for tensor in matrix.tensors)
        read += sum(total) * programs[0]
    return read / needed


@contextmanager
def first_rows_alone() -> Iterator[list[int]]:
    """Let kernels run the programs of the first rows alone. Yield how many the rows have."""
    counts: list[int] = []
    usual = launch.start

    def start(kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
        counts.append(grid[0])
        kernel[(1, *grid[1:])](*arguments, **constants)

    launch.start = start
    try:
        yield counts
    finally:
        launch.start = usual


@contextmanager
def sectors_read(memory: list[torch.Tensor]) -> Iterator[list[int]]:
    """Yield a list that at the end has the bytes that programs read of these tensors.

    Threads of a program share what one of them has read, in sectors of 32 bytes.
    """
    by_program: dict[object, list[np.ndarray]] = {}
    total: list[int] = []
    builder = interpreter.InterpreterBuilder
    usual = builder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        places = np.asarray(pointers.data, np.int64)[np.asarray(mask.data, bool)]
        for tensor in memory:
            first = tensor.data_ptr()
            own = places[(places >= first) & (places < first + tensor.nbytes)]
            by_program.setdefault(self.grid_idx, []).append(np.unique(own // _SECTOR))
        return usual(self, pointers, mask, *others)

    builder.create_masked_load = load
    try:
        yield total
    finally:
        builder.create_masked_load = usual
        parts = by_program.values()
        total.append(sum(len(np.unique(np.concatenate(each))) for each in parts) * _SECTOR)


def main() -> None:
    """Print the table, or the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    options = parser.parse_args()
    if options.json:
        print(json.dumps([asdict(row) for row in rows()], indent=1))
        return
    names = ("type", "resident", "launches", "kernels a layer", "syncs", "bytes of weights")
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for row in rows():
        counts = (row.launches, row.kernels_a_layer, row.syncs)
        cells = (row.type, f"{row.resident:.0%}", *map(str, counts), f"{row.bytes_of_weights:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
