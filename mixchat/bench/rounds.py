"""Measures the machine's limits and mixchat in turns.

Other programs slow both alike, so the median of the ratios is shown.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from mixchat.base import gpu, system
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import Note
from mixchat.engine.caches.sequence_cache import bytes_seen
from mixchat.engine.generate import Engine
from mixchat.kernels.cpu.pages import Bits
from mixchat.loading.loader import load_engine
from mixchat.planning.bandwidth import memory_rate, product_rate
from mixchat.planning.compute_speed import Effort, ExpertTimer
from mixchat.planning.expectation import PROMPT
from mixchat.planning.measuring import measure_machine, saved_speeds
from mixchat.weights.format.blueprint import HEAD, Blueprint
from mixchat.weights.format.installed_model import InstalledModel

_FILLING_CHECK_S = 0.05  # between two checks
_WARM_UP_TOKENS = 2  # their time is not taken
_WARM_PROMPTS = 3  # of which the median is shown
_SPARE_TOKENS = 64  # of the context
_RANDOM_TOKENS = 2048  # of random keys and values that are stored at once


@dataclass(frozen=True)
class BenchOptions:
    """The tasks to measure. `contexts` and `prompts` are counts of tokens."""

    contexts: Sequence[int] = (0,)
    prompts: Sequence[int] = (512,)
    tokens: int = 48  # decoded each time
    rounds: int = 5  # how often each task is measured

    @property
    def context_size(self) -> int:
        """Return the tokens of a context in which every task fits."""
        return max([n + self.tokens for n in self.contexts] + list(self.prompts)) + _SPARE_TOKENS


@dataclass
class BenchTask:
    """Decoding after `length` tokens, or a prompt of `length` tokens."""

    phase: Literal["decode", "prompt"]
    length: int
    rates: list[float] = field(default_factory=list)  # tokens a second, in each round
    limit_rates: list[float] = field(default_factory=list)  # the most that the limits allow

    @property
    def name(self) -> str:
        return f"{'decode after' if self.phase == 'decode' else 'prompt of'} {self.length:,} tokens"

    @property
    def limited_by(self) -> str:
        return "memory" if self.phase == "decode" else "compute"

    @property
    def of_limit(self) -> float:
        """Return the measured rate divided by the limit's, 0 to 1."""
        return median(rate / most for rate, most in zip(self.rates, self.limit_rates, strict=True))


@dataclass(frozen=True)
class PromptTime:
    """The seconds of a prompt of `PROMPT` tokens, and of waiting for `bytes_read` from disk."""

    seconds: float
    waiting: float
    bytes_read: int

    @property
    def computing(self) -> float:
        return self.seconds - self.waiting


@dataclass(frozen=True)
class ColdStart:
    """The seconds to the first token, with no byte of the model in memory, and of later prompts."""

    starting: float  # seconds until Python and its libraries run
    loading: float  # seconds to read the `shared` bytes, which all tokens share
    prompt: PromptTime
    warm: PromptTime
    shared: int
    disk: float | None  # bytes a second, None if it cannot be measured
    copy: float | None  # to a GPU, as `disk`

    @property
    def seconds(self) -> float:
        """Return the seconds from Enter in the shell to the first token."""
        return self.starting + self.loading + self.prompt.seconds


class Bench:
    """Measures an installed model on a device. `note` gets messages for a person."""

    def __init__(
        self,
        directory: Path,
        load: LoadOptions,
        options: BenchOptions,
        note: Note = lambda text: None,
    ) -> None:
        self._directory = directory
        self._load = load
        self._options = options
        self._note = note
        self._random = random.Random(0)
        with InstalledModel(directory) as installed:
            self.blueprint: Blueprint = installed.blueprint
        self.engine: Engine
        self.cold_start: ColdStart
        self.limits: list[Limits] = []
        self.tasks = [
            *(BenchTask("decode", length) for length in options.contexts),
            *(BenchTask("prompt", length) for length in options.prompts),
        ]

    def start_cold(self, starting: float = 0.0) -> None:
        """Load with nothing in the page cache, and generate the first token, then a later one.

        starting: seconds until Python and its libraries ran.
        """
        if system.drops_pages():
            for path in filter(Path.is_file, self._directory.iterdir()):  # a FIFO would wait
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)  # pages that are not on disk yet cannot leave the page cache
                    system.advise(fd, 0, 0, needed=False)
                finally:
                    os.close(fd)
        start = time.perf_counter()
        # Models with random weights repeat themselves, which speculation would predict too well.
        load = replace(self._load, speculation=False)
        self.engine = load_engine(self._directory, load, self._note)
        loading = time.perf_counter() - start
        first = self._first_token()
        while self.engine.experts.is_filling:  # loads would slow the next measurement
            time.sleep(_FILLING_CHECK_S)
        later = [self._first_token() for _ in range(_WARM_PROMPTS)]
        model = (self.blueprint, self._directory)
        device = self.engine.device
        speeds = saved_speeds(*model, device) or measure_machine(*model, device)
        self.cold_start = ColdStart(
            starting,
            loading,
            first,
            sorted(later, key=lambda prompt: prompt.seconds)[_WARM_PROMPTS // 2],
            self.blueprint.shared_size,
            speeds.disk_idle,
            speeds.gpus[0].bus if speeds.gpus else None,
        )

    def _first_token(self) -> PromptTime:
        self.engine.forget()
        self._rate(self._prompt(PROMPT), 0)
        stats = self.engine.stats
        used = stats.experts
        return PromptTime(stats.prefill_seconds, used.stalled_seconds, used.bytes_read)

    def run(self) -> Iterator[BenchTask]:
        """Yield each task right after it was measured."""
        exact = self.engine.exact_prompts
        meter = LimitsMeter(self.engine.device, self.blueprint, exact=exact)
        self._rate(self._prompt(64), 1)  # loads the experts
        for _ in range(self._options.rounds):
            for task in self.tasks:
                self.limits.append(limits := meter.measure())
                task.limit_rates.append(self._most(task, limits))
                task.rates.append(self.measure(task))
                yield task

    def measure(self, task: BenchTask) -> float:
        """Return the tokens a second of a task, measured once."""
        if task.phase == "prompt":
            self._hold_random(0)
            self._rate(self._prompt(task.length), 0)
            return task.length / self.engine.stats.prefill_seconds
        self._hold_random(task.length)
        return self._rate([0] * task.length + self._prompt(1), self._options.tokens)

    def _most(self, task: BenchTask, limits: Limits) -> float:
        if task.phase == "prompt":
            return limits.gemm / operations_per_token(self.blueprint)
        return limits.memory / bytes_per_token(self.blueprint, task.length, self._load.kv_bits)

    def _hold_random(self, context: int) -> None:
        """Hold random keys and values, since computing them would take minutes."""
        self.engine.forget()
        _, cache = self.engine.held()
        while cache.length < context:
            count = min(_RANDOM_TOKENS, context - cache.length)
            cache.fill(count, self.blueprint.quantization.dtype)
        self.engine.resume([0] * context)

    def _prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(5, self.blueprint.config.vocab_size) for _ in range(tokens)]

    def _rate(self, prompt: list[int], tokens: int) -> float:
        """Return tokens a second after `_WARM_UP_TOKENS`."""
        # Without stop ids no answer ends before its last token.
        answer = self.engine.generate(prompt, sampling=SamplingOptions(seed=0), stop_ids=set())
        for _ in islice(answer, 1 + (_WARM_UP_TOKENS if tokens else 0)):
            pass
        start = time.perf_counter()
        count = len(list(islice(answer, tokens)))
        assert count == tokens
        return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class Limits:
    """The limits of the device that computes."""

    memory: float  # bytes a second in reading
    gemm: float  # operations a second of matrix products; on a CPU, of a long prompt's experts


class LimitsMeter:
    """Measures the limits again and again, because they change."""

    def __init__(self, device: torch.device, blueprint: Blueprint, *, exact: bool = False) -> None:
        self._device = device
        self._exact = exact
        self._experts = None if gpu.is_gpu(device) else ExpertTimer(blueprint, Effort())

    @torch.inference_mode()
    def measure(self) -> Limits:
        if self._experts is None:
            gemm = product_rate(self._device)
        else:
            gemm = self._experts.operations_rate(exact=self._exact)
        return Limits(memory_rate(self._device), gemm)


def bytes_per_token(blueprint: Blueprint, context: int, kv_bits: Bits | None) -> int:
    """Return the bytes that decoding a token reads after `context` other tokens."""
    config = blueprint.config
    experts = config.num_moe_layers * config.num_experts_per_tok * blueprint.mean_expert
    matrices = sum(t.nbytes for spec in blueprint.shared_matrices.values() for t in spec.tensors)
    # A token needs one row of the embedding, unless the embedding is the head, too.
    tied = 0 if blueprint.head else blueprint.embedding.nbytes
    cache = bytes_seen(config, context, blueprint.quantization.dtype, kv_bits)
    return experts + matrices + tied + cache


def operations_per_token(blueprint: Blueprint) -> int:
    """Return the operations of a prompt's token in all matrices but the head."""
    config = blueprint.config
    matrices = [
        matrix for name, matrix in blueprint.shared_matrices.items() if name != HEAD
    ]  # only the last token of a prompt passes the head
    experts = [blueprint.expert.gate_up, blueprint.expert.down]
    matrices += experts * config.num_experts_per_tok * config.num_moe_layers
    # A multiplication and an addition are two operations.
    return sum(2 * matrix.rows * matrix.columns for matrix in matrices)
