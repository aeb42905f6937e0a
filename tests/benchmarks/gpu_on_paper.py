"""Predicts tokens a second on GPUs that nobody here has, by the arithmetic of `mixchat plan`.

    python tests/benchmarks/gpu_on_paper.py [--ram-speed 60] [--json]

It is a prediction. Bytes follow from the models' shapes, and bandwidths from the data sheets of the
cards. The part of a bandwidth that kernels reach, the time of a kernel and that of a wait are
assumed (`planning/machine_speeds.py`). The host's seconds were measured on one machine
(`gpu_costs.py`). The RAM's speed is assumed, and that the CPU's kernels reach 80% of it.
Launches are the budget that `gpu_budget.py` counts. The published figures are measurements of other
programs, with bits of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.bench.rounds import bytes_per_token
from mixchat.experts.placement import Placement
from mixchat.install.make.outline import known_blueprints
from mixchat.planning.cards import Card, find_card
from mixchat.planning.expectation import LONG_PROMPT, SpeedEstimate
from mixchat.planning.fitting import FreeMemory, expected_mix, fit_model
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.weights.format.blueprint import Blueprint

CARDS = ("RTX 3090", "RTX 4060", "H100")
MODELS = {"qwen3": "Qwen3-30B-A3B", "gpt-oss": "gpt-oss-20b", "instruct": "Mixtral 8x7B"}
BITS = {"qwen3": (4, 3, 2), "gpt-oss": (4,), "instruct": (4, 3, 2)}  # gpt-oss comes in MXFP4
LAUNCHES_PER_LAYER = 3  # beside missing experts
CPU_PART = 0.8
HOST_BYTES, TAKEN_GPU = 62 * 10**9, 5 * 10**8
LONG_CONTEXT = 8192
OPTIONS = LoadOptions(context_size=LONG_CONTEXT)


@dataclass(frozen=True)
class Published:
    """Another program's measurement. share: of the experts in VRAM. ram: GB/s, None if unknown."""

    card: str
    model: str
    share: float
    program: str
    speed: float
    source: str
    ram: float | None = None


PUBLISHED = (
    Published("RTX 3090 Ti", "qwen3", 1, "llama.cpp Q4_K", 166.9, "smeltcore.com/recipes"),
    Published("RTX 3090", "gpt-oss", 1, "llama.cpp MXFP4", 186.3, "llama.cpp #15631"),
    Published("RTX 4090", "gpt-oss", 1, "llama.cpp MXFP4", 173.3, "llama.cpp #16649"),
    Published("RTX 3060", "gpt-oss", 22 / 24, "llama.cpp MXFP4", 64, "smeltcore.com/recipes"),
    Published("RTX 2080", "qwen3", 12 / 48, "llama.cpp Q4_K_M", 36.7, "llmfit #755", 102),
    Published("RTX 2080", "gpt-oss", 12 / 24, "llama.cpp MXFP4", 36.4, "llmfit #775", 102),
    Published("H100", "instruct", 1, "llama.cpp Q5_K_M", 60.7, "llama-cpp-python #1017 (2023)"),
    Published("A100 80GB", "instruct", 1, "gpt-fast, 8 bits", 98, "gpt-fast's README"),
)


@dataclass(frozen=True)
class Prediction:
    """The tokens a second with a part of the experts in VRAM, and what a token needs.

    vram, ram: bytes that a token reads there. launches: that the host starts. long_speed: of a
    token after a long context. prompt_speed: of a prompt's tokens.
    """

    share: float
    vram: int
    ram: int
    launches: int
    speed: float
    long_speed: float
    prompt_speed: float


def model_in(bits: int, name: str) -> Blueprint:
    blueprint = next(known for names, known in known_blueprints().items() if name in names)
    if name == "gpt-oss":
        return blueprint
    return expected_mix(blueprint, ExpertSize.parse(str(bits)))


def predict(blueprint: Blueprint, card: Card, slots: int, ram_speed: float) -> Prediction:
    """Return the prediction with `slots` experts in VRAM. ram_speed: bytes a second."""
    config = blueprint.config
    expert_s = blueprint.mean_expert / (CPU_PART * ram_speed)
    gpus = (GPUSpeeds.of_card(card),)
    speeds = MachineSpeeds(None, None, {1: expert_s, 8: expert_s}, 1, gpus)
    experts = blueprint.expert_count
    placement = Placement(slots, experts - slots, experts)
    estimate = SpeedEstimate(blueprint, torch.device(gpu.KIND), speeds, placement)
    long_speed = replace(estimate, context=LONG_CONTEXT).tokens_per_second
    prompt = estimate.prompt(LONG_PROMPT)
    assert estimate.tokens_per_second is not None  # nothing comes from the disk
    assert long_speed is not None
    assert prompt is not None
    uses, hit_rate = config.num_moe_layers * config.num_experts_per_tok, estimate.hit_rate
    whole = bytes_per_token(blueprint, 0, None)
    ram = int((1 - hit_rate) * uses * blueprint.mean_expert)
    return Prediction(
        slots / blueprint.expert_count,
        whole - ram,
        ram,
        1 if hit_rate == 1 else LAUNCHES_PER_LAYER * config.num_hidden_layers,
        estimate.tokens_per_second,
        long_speed,
        LONG_PROMPT / prompt.seconds,
    )


def fitting_slots(blueprint: Blueprint, card: Card) -> int:
    """Return the experts that the card holds beside all else, by the plan."""
    free = FreeMemory(HOST_BYTES, card.memory - TAKEN_GPU)
    try:
        return fit_model(blueprint, free, OPTIONS).placement.slots
    except ResourceError:
        return 0


def models_table() -> Iterator[tuple[str, ...]]:
    """Yield what a token needs of each model, whatever the card."""
    yield "model", "experts", "GB a token", "launches, part in RAM"
    card = find_card(CARDS[0])
    assert card is not None
    for name, title in MODELS.items():
        for bits in BITS[name]:
            blueprint = model_in(bits, name)
            found = predict(blueprint, card, blueprint.expert_count, 1e9)
            layers = blueprint.config.num_hidden_layers
            yield (
                title,
                types_of(blueprint),
                f"{found.vram / 1e9:.2f}",
                f"{LAUNCHES_PER_LAYER * layers}",
            )


def types_of(blueprint: Blueprint) -> str:
    """Return the types of experts, and of the other matrices."""
    types = sorted({form.gate_up.quant_type for form in blueprint.expert_forms})
    return f"{' and '.join(types)}, others {blueprint.quantization.attention}"


def cards_table(ram_speed: float) -> Iterator[tuple[str, ...]]:
    """Yield the predictions for each card, with all, half and as many experts as fit in VRAM."""
    titles = "all", "half", "as many as fit", "after 8,192 tokens", "prompt of 512"
    yield "card", "model", "experts", *titles
    for card in map(find_card, CARDS):
        assert card is not None
        for name, title in MODELS.items():
            for bits in BITS[name]:
                blueprint = model_in(bits, name)
                experts, fitting = blueprint.expert_count, fitting_slots(blueprint, card)
                whole, half, fit = (
                    predict(blueprint, card, slots, ram_speed)
                    for slots in (experts, experts // 2, fitting)
                )
                share = "all" if fitting == experts else f"{fitting / experts:.0%}"
                yield (
                    card.name,
                    title,
                    f"{bits} bits",
                    f"{whole.speed:.0f}" + ("" if fitting == experts else " (do not fit)"),
                    f"{half.speed:.0f}",
                    f"{fit.speed:.0f} ({share})",
                    f"{fit.long_speed:.0f}",
                    f"{fit.prompt_speed:.0f}",
                )


def published_table(ram_speed: float) -> Iterator[tuple[str, ...]]:
    """Yield other programs' figures, and the predictions for the same card and share."""
    yield "card", "model", "in VRAM", "published", "by", "source", "predicted, 4 bits"
    for row in PUBLISHED:
        card, blueprint = find_card(row.card), model_in(4, row.model)
        assert card is not None
        slots = round(row.share * blueprint.expert_count)
        found = predict(blueprint, card, slots, ram_speed if row.ram is None else 1e9 * row.ram)
        share, speed = f"{row.share:.0%}", f"{row.speed:g}"
        title = MODELS[row.model]
        yield row.card, title, share, speed, row.program, row.source, f"{found.speed:.0f}"


def as_json(ram_speed: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for card in map(find_card, CARDS):
        assert card is not None
        for name, bits_of_model in BITS.items():
            for bits in bits_of_model:
                blueprint = model_in(bits, name)
                experts = blueprint.expert_count
                for slots in (experts, experts // 2, fitting_slots(blueprint, card)):
                    found = asdict(predict(blueprint, card, slots, ram_speed))
                    rows.append({"card": card.name, "model": name, "bits": bits, **found})
    return rows


def markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head, *cells = rows
    lines = [head, tuple("-" * len(cell) for cell in head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ram-speed", type=float, default=60.0, help="GB/s of the RAM (60)")
    parser.add_argument("--json", action="store_true", help="print rows for programs")
    arguments = parser.parse_args()
    ram_speed = 1e9 * arguments.ram_speed
    if arguments.json:
        print(json.dumps(as_json(ram_speed), indent=1))
        return
    print(markdown(models_table()), markdown(cards_table(ram_speed)), sep="\n\n")
    print(f"\n{markdown(published_table(ram_speed))}")


if __name__ == "__main__":
    main()
