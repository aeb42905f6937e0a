"""Estimates how fast a model decodes and reads prompts, from measured speeds and a placement.

Costs are None if the disk is needed and was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.sequence_cache import bytes_seen
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.memory import CPU
from mixchat.experts.placement import Placement
from mixchat.experts.prefetch import LAYERS_AHEAD
from mixchat.kernels.cpu.pages import Bits
from mixchat.planning.gpu_costs import GPUCosts
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.planning.routing import expected_hit_rate
from mixchat.weights.format.blueprint import Blueprint

# While a GPU or several answers' tokens compute, the disk reads this part of what it could read, by
# `tests/benchmarks/beyond_memory.py`. Some experts are known too late. A prompt needs most experts
# of a layer, so they are read while the layers before it are computed.
OVERLAP = 0.5
PROMPT_OVERLAP = 1.0
# Slots have small pages. Reads into them reach this part of the disk's measured speed.
# `tests/benchmarks/beyond_memory.py` measures 0.7 to 0.95.
IN_USE = 0.85
# Seconds that a layer on a CPU takes longer if some experts are on the disk, because Python
# requests, predicts and counts each expert. 24 of Qwen3's layers took the main thread 61 ms instead
# of 41.
MISSING_EXPERTS_S = 8e-4
# Tokens before the one whose speed is estimated. So many are before it when a CPU's layer is
# measured.
CONTEXT = 128
# Tokens a second. People read 238 words a minute (Brysbaert 2019, doi 10.1016/j.jml.2019.104047)
# of some 1.3 tokens each. With the other figure, 200 words take four minutes.
READING = 5.0
SLOWEST = 1.0
PROMPT = 12  # tokens of a short prompt
LONG_PROMPT = 512  # tokens of a long prompt


@dataclass(frozen=True)
class Cost:
    """The seconds of one decoded token, or of a prompt."""

    computing: float  # of layers, chosen experts and the head
    waiting: float  # in which GPUs wait for experts that the CPU computes
    copying: float  # of experts from RAM to a GPU
    reading: float  # of experts from an idle disk
    hidden: float  # in which copying or reading overlaps with computing

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting + self.copying + self.reading - self.hidden


@dataclass(frozen=True)
class SpeedEstimate:
    """The speed of a model with a placement of its experts.

    device: computes, together with the other GPUs of the placement. answers: that are generated
    at once. Each gets a token in each pass. context: tokens before it. kv_bits: of their keys and
    values, None for those of the model.
    """

    blueprint: Blueprint
    device: torch.device
    speeds: MachineSpeeds
    placement: Placement
    answers: int = 1
    context: int = CONTEXT
    kv_bits: Bits | None = None

    @property
    def hit_rate(self) -> float:
        """Return the hit rate of the slots, 0 to 1."""
        return expected_hit_rate(self.blueprint.config, sum(self.placement.by_device))

    @property
    def host_hit_rate(self) -> float:
        """Return the hit rate of slots and RAM together, 0 to 1."""
        return expected_hit_rate(self.blueprint.config, self.placement.held)

    @property
    def token(self) -> Cost | None:
        """Return the cost of a token of each answer."""
        return self._cpu_token() if self.device == CPU else self._gpu_token()

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed of each answer."""
        token = self.token
        return None if token is None else 1 / token.seconds

    def prompt(self, tokens: int, *, cold: bool = False) -> Cost | None:
        """Return the cost of a prompt, computed in chunks. `cold`: all experts come from disk.

        A GPU has missing experts copied.
        """
        config = self.blueprint.config
        placement = self.placement
        read = 1.0 if cold else 1 - placement.held / placement.experts
        chunks = [min(PREFILL_CHUNK, tokens - start) for start in range(0, tokens, PREFILL_CHUNK)]
        distinct = [expected_distinct(config, chunk) for chunk in chunks]
        uses = config.num_moe_layers * sum(distinct)
        if self.device == CPU:
            computing = self._pace(self._head_bytes)
            computing += sum(map(self._cpu_chunk, chunks, distinct))
            return self._cost(computing, read=uses * read, overlap=PROMPT_OVERLAP)
        missing = 1.0 if cold else 1 - sum(placement.by_device) / placement.experts
        gpu = self._gpu
        computing = self._head_bytes / gpu.memory + gpu.round_trip
        computing += sum(map(self._gpu_costs.chunk, chunks, distinct))
        copying = uses * missing * self.blueprint.mean_expert / gpu.bus
        return self._cost(computing, copying=copying, read=uses * read, overlap=PROMPT_OVERLAP)

    def _cpu_token(self) -> Cost | None:
        config = self.blueprint.config
        answers = self.answers
        speeds = self.speeds
        layers = config.num_moe_layers
        uses = expected_distinct(config, answers)
        # The time of all matrices grows alike with the rows.
        slowdown = speeds.expert_time(answers) / speeds.expert_time(1)
        layers_s = (
            slowdown * (layers * speeds.layer_seconds + self._pace(self._first_bytes))
            + (layers * MISSING_EXPERTS_S if self.hit_rate < 1 else 0.0)
            + layers * uses * speeds.expert_time(answers * config.num_experts_per_tok / uses)
        )
        computing = layers_s + slowdown * self._pace(self._head_bytes)
        overlap = OVERLAP
        if answers == 1:
            # Experts of a token's first layers are not predicted, others are predicted too late,
            # and no expert is read during the head. With 0.5 for all, plans for 12 layers of Qwen3
            # were up to 25% too fast, and for 24 and 48 layers up to 22% too slow. These are within
            # 20%.
            in_time = max(1 - 2 * LAYERS_AHEAD / layers, 0.0)
            overlap = in_time * layers_s / computing
        dtype = self.blueprint.quantization.dtype
        before, seen = (
            bytes_seen(config, tokens, dtype, self.kv_bits) for tokens in (CONTEXT, self.context)
        )
        computing += answers * self._pace(seen - before)
        return self._cost(computing, read=layers * uses * (1 - self.hit_rate), overlap=overlap)

    def _gpu_token(self) -> Cost | None:
        """Return the cost on GPUs, while the CPU computes the experts that are in no slot.

        Several answers take turns, but an expert that one answer has read from the disk serves all.
        """
        config = self.blueprint.config
        costs = self._gpu_costs
        hit_rate = self.hit_rate
        hops = sum(1 for count in self._shares if count)
        computing = costs.token(hit_rate, hops, self.context, self.kv_bits)
        waiting = 0.0
        if hit_rate < 1:
            misses = config.num_moe_layers * config.num_experts_per_tok * (1 - hit_rate)
            waiting = misses * self.speeds.expert_time(1) + costs.missing(misses)
        read = config.num_moe_layers * expected_distinct(config, self.answers)
        read *= 1 - self.host_hit_rate
        return self._cost(self.answers * computing, waiting=self.answers * waiting, read=read)

    def _cpu_chunk(self, tokens: int, distinct: float) -> float:
        """Return the seconds of a chunk that uses `distinct` experts of each layer, on a CPU."""
        config = self.blueprint.config
        speeds = self.speeds
        slowdown = speeds.expert_time(tokens) / speeds.expert_time(1)
        rows = tokens * config.num_experts_per_tok / distinct
        layer_s = slowdown * speeds.layer_seconds + distinct * speeds.expert_time(rows)
        return slowdown * self._pace(self._first_bytes) + config.num_moe_layers * layer_s

    def _cost(
        self,
        computing: float,
        *,
        waiting: float = 0.0,
        copying: float = 0.0,
        read: float,
        overlap: float = OVERLAP,
    ) -> Cost | None:
        """Return the cost of a token or a prompt that reads `read` experts from disk."""
        busy = self.speeds.disk_busy
        idle = self.speeds.disk_idle
        if not read:
            moving = copying
            slowed = 1.0
        elif busy is None or idle is None:
            return None
        else:
            alone = max(busy, idle)
            reading = read * self.blueprint.mean_expert / (IN_USE * alone)
            moving = copying + reading
            slowed = busy / alone
        hidden = overlap * min((computing + waiting) * slowed, moving)
        return Cost(computing, waiting, copying, moving - copying, hidden)

    def _pace(self, size: int) -> float:
        """Return the seconds of a CPU for `size` bytes of weights, at the rate of its experts."""
        return size / self.blueprint.mean_expert * self.speeds.expert_time(1)

    @property
    def _shares(self) -> Sequence[int]:
        """Return the layers that each GPU holds, or else its slots."""
        return self.placement.layers or self.placement.by_device

    @property
    def _gpu(self) -> GPUSpeeds:
        return GPUSpeeds.together(self.speeds.gpus, self._shares)

    @property
    def _gpu_costs(self) -> GPUCosts:
        return GPUCosts(self.blueprint, self._gpu)

    @property
    def _head_bytes(self) -> int:
        return (self.blueprint.head or self.blueprint.embedding).nbytes

    @property
    def _first_bytes(self) -> int:
        """Return the bytes of the first layers, which have no experts."""
        layers = range(self.blueprint.config.first_k_dense_replace)
        matrices = [matrix for layer in layers for matrix in self.blueprint.dense_matrices(layer)]
        return sum(matrix.nbytes for matrix in matrices)


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Return how many experts of a layer `tokens` tokens use together, chosen by chance.

    Of 8 experts with 2 a token, two tokens use 3.5.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


def in_words(tokens_per_second: float) -> str:
    """Return a sentence that compares a speed with a reader's."""
    if tokens_per_second >= READING:
        return "faster than you read"
    if tokens_per_second >= SLOWEST:
        return "slower than you read"
    return "much slower than you read"
