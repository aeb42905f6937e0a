"""Predicts how fast a model decodes and reads prompts, by what was measured and memory holds.

Costs and speeds are None if the disk is needed and was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.memory import CPU
from mixchat.experts.placement import Placement
from mixchat.experts.prefetch import LAYERS_AHEAD
from mixchat.planning.fitting import MemoryPlan
from mixchat.planning.gpu_cost import GPUWork
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.routing import expected_hit_rate
from mixchat.weights.format.blueprint import Blueprint

# The part that is read of what could be read while a GPU or several answers' tokens compute. Their
# experts are known too late for all, by `tests/benchmarks/beyond_memory.py`. A prompt needs most
# experts of a layer, which are read while the layers before it are computed.
OVERLAP, PROMPT_OVERLAP = 0.5, 1.0
# Of a layer on a CPU, if some experts are on the disk. Python finds, requests, predicts and counts
# each expert. The main thread computed 61 ms instead of 41 for 24 of Qwen3's layers.
MISSING_EXPERTS_S = 8e-4
# Of loading, whatever the size, and for each expert, whose tensors are looked up.
_LOADING_S, _EXPERT_LOADING_S = 0.1, 5e-5
# Tokens a second. People read 238 words a minute (Brysbaert 2019, doi 10.1016/j.jml.2019.104047)
# of some 1.3 tokens each. With the other figure, 200 words take four minutes.
READING = 5.0
SLOWEST = 1.0
PROMPT = 12  # tokens of a short prompt
LONG_PROMPT = 512  # tokens of a long prompt


@dataclass(frozen=True)
class ModelSize:
    """The parts of a model that cost time."""

    layers: int  # with experts
    experts_per_token: int
    expert: int  # bytes of one, the mean of all layers
    head: int  # bytes
    first_layers: int = 0  # bytes of the first layers, which have no experts


@dataclass(frozen=True)
class TokenCost:
    """The seconds of one decoded token, or of a prompt."""

    computing: float  # seconds for layers, chosen experts and head
    copying: float  # seconds for `copied` experts from RAM to a GPU
    reading: float  # seconds for `read` experts from an idle disk
    copied: float
    read: float
    slowed: float = 1.0  # the part of its speed that the disk has while the cores compute
    waiting: float = 0.0  # seconds that GPUs wait for `missed` experts, which the CPU computes
    missed: float = 0.0
    overlap: float = OVERLAP  # the part that is read of what could be read while computing

    @property
    def hidden(self) -> float:
        """Return the seconds saved because moving and computing overlap."""
        computing = self.computing + self.waiting
        return self.overlap * min(computing * self.slowed, self.copying + self.reading)

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting + self.copying + self.reading - self.hidden


@dataclass(frozen=True)
class SpeedRange:
    """Tokens a second of one answer, by the slowest and the fastest sample."""

    low: float
    high: float
    measured_at: float  # seconds since 1970

    @property
    def in_words(self) -> str:
        """Return what this speed means for a reader."""
        if self.low >= READING:
            return "faster than you read"
        if self.high >= READING:
            return "about as fast as you read"
        if self.high >= SLOWEST:
            return "slower than you read"
        return "much slower than you read"


@dataclass(frozen=True)
class Expectation:
    """The speed of a model in decoding, with a placement of its experts."""

    held: int  # different experts in the slots and in RAM
    hit_rate: float  # of the slots, 0 to 1
    host_hit_rate: float  # of slots and RAM together
    cost: TokenCost | None  # by the typical figures of all samples
    speed: SpeedRange | None  # of each answer
    answers: int = 1  # generated at once

    @property
    def tokens_per_second(self) -> float | None:
        """Return the typical speed of each answer."""
        return None if self.cost is None else 1 / self.cost.seconds

    @property
    def together(self) -> SpeedRange | None:
        speed, answers = self.speed, self.answers
        return speed and replace(speed, low=answers * speed.low, high=answers * speed.high)


def expect(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement,
    answers: int = 1,
) -> Expectation:
    """Return the speed of the model in decoding on `device`, and on the other GPUs of a placement.

    Each of `answers` gets a token in each pass.
    """
    hit_rate = expected_hit_rate(blueprint.config, sum(placement.by_device))
    host_hit_rate = expected_hit_rate(blueprint.config, placement.held)
    uses = expected_distinct(blueprint.config, answers)
    parts = size_of(blueprint)
    if device == CPU:
        costs = [
            token_cost(parts, speeds, hit_rate, answers=answers, uses=uses)
            for speeds in measurement.in_use
        ]
    else:
        shares = placement.layers or placement.by_device
        costs = [
            gpu_token_cost(blueprint, speeds, shares, hit_rate, host_hit_rate, answers=answers)
            for speeds in measurement.in_use
        ]
    speed = None
    if seconds := [cost.seconds for cost in costs if cost is not None]:
        speed = SpeedRange(1 / max(seconds), 1 / min(seconds), measurement.measured_at)
    return Expectation(placement.held, hit_rate, host_hit_rate, costs[0], speed, answers)


def expect_fit(fit: MemoryPlan, device: torch.device, measurement: Measurement) -> Expectation:
    """Return the speed of decoding with the places and the answers at once of a fit."""
    return expect(fit.blueprint, device, measurement, fit.placement, fit.options.parallel)


def token_cost(
    size: ModelSize,
    speeds: MachineSpeeds,
    hit_rate: float,
    *,
    answers: int = 1,
    uses: float | None = None,
) -> TokenCost | None:
    """Return the cost of a decoded token of each of several answers on a CPU.

    RAM holds the part `hit_rate` of the experts used. All answers use `uses` experts of a layer
    together, None for one answer.
    """
    row_s = speeds.expert_time(1)
    # More rows slow all matrices alike.
    slowdown = speeds.expert_time(answers) / row_s
    uses = uses or float(size.experts_per_token)
    expert_s = speeds.expert_time(answers * size.experts_per_token / uses)
    uses *= size.layers
    read = uses * (1 - hit_rate)
    head_s = slowdown * size.head / size.expert * row_s
    layers_s = (
        slowdown * size.layers * speeds.layer_seconds
        + (size.layers * MISSING_EXPERTS_S if hit_rate < 1 else 0.0)
        + uses * expert_s
        + slowdown * size.first_layers / size.expert * row_s
    )
    computing, overlap = layers_s + head_s, OVERLAP
    if answers == 1:
        # The experts of a token's first layers are not predicted, as many are predicted too late,
        # and nothing is read beside the head. With 0.5 for all, plans for 12 layers of Qwen3 were
        # up to 25% too fast, and for 24 and 48 layers up to 22% too slow. These are within 20%.
        in_time = max(1 - 2 * LAYERS_AHEAD / size.layers, 0.0)
        overlap = in_time * layers_s / computing
    return moving_cost(size.expert, speeds, computing, read=read, overlap=overlap)


def gpu_token_cost(
    blueprint: Blueprint,
    speeds: MachineSpeeds,
    shares: Sequence[int],
    hit_rate: float,
    host_hit_rate: float,
    *,
    answers: int = 1,
) -> TokenCost | None:
    """Return the cost of a decoded token on GPUs with `shares` as in `GPUWork`.

    VRAM holds the part `hit_rate` of the experts used, together with RAM `host_hit_rate`. The
    CPU computes the experts that are in no slot. Several answers take turns, but what one of them
    has read from the disk serves the others.
    """
    config = blueprint.config
    work = GPUWork(blueprint, speeds.gpus, shares)
    chosen = config.num_experts_per_tok
    computing, waiting = work.token(hit_rate, chosen, speeds.expert_time(1))
    layers, distinct = config.num_moe_layers, expected_distinct(config, answers)
    read = layers * distinct * (1 - host_hit_rate)
    cost = moving_cost(blueprint.mean_expert, speeds, answers * computing, read=read)
    missed = answers * layers * chosen * (1 - hit_rate)
    return cost and replace(cost, waiting=answers * waiting, missed=missed)


def moving_cost(
    expert: int,
    speeds: MachineSpeeds,
    computing: float,
    *,
    copied: float = 0.0,
    read: float,
    overlap: float = OVERLAP,
) -> TokenCost | None:
    """Return the cost of `computing` seconds, of experts copied to a GPU, and of experts read.

    An expert has `expert` bytes.
    """
    if read and speeds.disk_bandwidth is None:
        return None
    busy = speeds.disk_bandwidth or 1.0
    alone = max(speeds.disk_bandwidth_idle or busy, busy)
    return TokenCost(
        computing=computing,
        copying=copied * expert / speeds.gpus[0].bus if copied else 0.0,
        reading=read * expert / alone,
        copied=copied,
        read=read,
        slowed=busy / alone if read else 1.0,
        overlap=overlap,
    )


def size_of(blueprint: Blueprint) -> ModelSize:
    """Return the parts of a model that cost time."""
    config, head = blueprint.config, blueprint.head or blueprint.embedding
    first = range(config.first_k_dense_replace)
    matrices = [matrix for layer in first for matrix in blueprint.dense_matrices(layer)]
    return ModelSize(
        layers=config.num_moe_layers,
        experts_per_token=config.num_experts_per_tok,
        expert=blueprint.mean_expert,
        head=head.nbytes,
        first_layers=sum(matrix.nbytes for matrix in matrices),
    )


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Return how many experts of a layer `tokens` tokens use together, chosen by chance.

    Of 8 experts with 2 a token, two tokens use 3.5.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


@dataclass(frozen=True)
class FirstToken:
    """The seconds until the first token of a prompt of `tokens` tokens."""

    tokens: int
    loading: float  # of what all tokens share, before the prompt
    prompt: TokenCost  # by the typical figures of all samples
    low: float  # of the prompt by the fastest sample of a measurement
    high: float  # and by the slowest

    @property
    def seconds(self) -> float:
        return self.loading + self.prompt.seconds


def first_token(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement | None,
    tokens: int = PROMPT,
) -> FirstToken | None:
    """Return the time of a prompt of `tokens` tokens, with nothing in memory if no placement.

    With a placement, the model is loaded, and as many experts as fit are in memory. Without one a
    single GPU computes.
    """
    samples: Sequence[MachineSpeeds]
    if placement is None:
        samples = [sample.cold for sample in (measurement.typical, *measurement.samples)]
        missing = read = 1.0
        shares: Sequence[int] = (1,)
        disk = samples[0].disk_bandwidth
        loading = _LOADING_S + blueprint.expert_count * _EXPERT_LOADING_S
        loading += blueprint.shared_size / disk if disk else 0.0
    else:
        samples, loading = measurement.in_use, 0.0
        shares = placement.layers or placement.by_device
        missing = 1 - sum(placement.by_device) / placement.experts
        read = 1 - placement.held / placement.experts
    costs = [
        cost
        for speeds in samples
        if (
            cost := prompt_cost(
                blueprint, device, speeds, tokens, missing=missing, read=read, shares=shares
            )
        )
    ]
    if not costs:
        return None
    seconds = [cost.seconds for cost in costs]
    return FirstToken(tokens, loading, costs[0], min(seconds), max(seconds))


def prompt_speed(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement | None,
    tokens: int = LONG_PROMPT,
) -> SpeedRange | None:
    """Return the tokens a second of a prompt. The arguments are as in `first_token`."""
    first = first_token(blueprint, device, measurement, placement, tokens)
    if first is None:
        return None
    return SpeedRange(tokens / first.high, tokens / first.low, measurement.measured_at)


def prompt_cost(
    blueprint: Blueprint,
    device: torch.device,
    speeds: MachineSpeeds,
    prompt: int,
    *,
    missing: float,
    read: float,
    shares: Sequence[int] = (1,),
) -> TokenCost | None:
    """Return the cost of a prompt of `prompt` tokens, computed in chunks.

    In each chunk no slot holds the part `missing` of the experts used, 0 to 1, and the part `read`
    comes from disk. A GPU has missing experts copied. `shares` are as in `GPUWork`.
    """
    config, size = blueprint.config, size_of(blueprint)
    chunks = [min(PREFILL_CHUNK, prompt - start) for start in range(0, prompt, PREFILL_CHUNK)]
    distinct = [expected_distinct(config, tokens) for tokens in chunks]
    uses = config.num_moe_layers * sum(distinct)
    if device != CPU:
        work = GPUWork(blueprint, speeds.gpus, shares)
        computing = work.head() + sum(map(work.chunk, chunks, distinct))
        return moving_cost(
            size.expert,
            speeds,
            computing,
            copied=uses * missing,
            read=uses * read,
            overlap=PROMPT_OVERLAP,
        )
    row_s = speeds.expert_time(1)
    computing = size.head / size.expert * row_s
    for tokens, experts in zip(chunks, distinct, strict=True):
        rows = tokens * config.num_experts_per_tok / experts
        # More rows slow all matrices alike.
        slowdown = speeds.expert_time(tokens) / row_s
        layer_s = slowdown * speeds.layer_seconds + experts * speeds.expert_time(rows)
        first_layers_s = slowdown * size.first_layers / size.expert * row_s
        computing += first_layers_s + config.num_moe_layers * layer_s
    return moving_cost(size.expert, speeds, computing, read=uses * read, overlap=PROMPT_OVERLAP)
