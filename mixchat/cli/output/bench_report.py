"""The result of `mixchat bench` as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from mixchat.base import machine
from mixchat.base.quantities import format_count
from mixchat.bench.rounds import Bench, BenchTask, PromptTime
from mixchat.cli.output.reports import Report, aligned, weight_type
from mixchat.engine.report import slots_in_words
from mixchat.kernels.cpu.compile import instruction_set
from mixchat.planning.expectation import PROMPT


@dataclass(frozen=True)
class BenchReport(Report):
    """The speed of a model next to the limits of this machine."""

    bench: Bench

    def as_text(self) -> str:
        return f"{self.heading()}\n\n{aligned(task_table(self.bench.tasks))}"

    def heading(self) -> str:
        """Return machine, model, limits and cold start, a line for each."""
        # The limits change from round to round. GB and TFLOP are decimal, as data sheets have them.
        bench = self.bench
        cold = self.bench.cold_start
        memory = median(limits.memory for limits in bench.limits) / 1e9
        gemm = median(limits.gemm for limits in bench.limits) / 1e12
        limits = f"Limits: memory {memory:.1f} GB/s, matrix products {gemm:.2f} TFLOP/s"
        if cold.disk is not None:
            limits += f", disk {cold.disk / 1e9:.1f} GB/s"
        if cold.copy is not None:
            limits += f", copies to the GPU {cold.copy / 1e9:.1f} GB/s"
        warm = f"{cold.warm.seconds:.2f} s for a prompt of {PROMPT} tokens"
        first_tokens = (
            f"First token: {warm} ({_parts(cold.warm)})",
            f"Cold start: {cold.seconds:.1f} s from Enter in the shell to that token, "
            "with nothing in memory",
            f"  {cold.starting:.1f} s starting, {cold.loading:.1f} s loading "
            f"{cold.shared / 1e9:.2f} GB, {_parts(cold.prompt)}",
        )
        slots = bench.engine.slots_by_tier
        places = [f"Experts: {slots_in_words(slots)}"] if "worker" in slots else []
        return "\n".join((_machine(bench), _model(bench), *places, limits, *first_tokens))

    def as_json(self) -> dict[str, Any]:
        """Return figures by round, rates in tokens a second, the rest in SI units."""
        bench = self.bench
        cold = self.bench.cold_start
        return {
            "machine": _machine(bench),
            "model": _model(bench),
            "slots": bench.engine.slots_by_tier,
            "limits": {
                "memory": [limits.memory for limits in bench.limits],
                "gemm": [limits.gemm for limits in bench.limits],
                "disk": cold.disk,
                "copy": cold.copy,
            },
            "cold": {
                "starting": cold.starting,
                "loading": cold.loading,
                "shared": cold.shared,
                "prompt": asdict(cold.prompt),
                "seconds": cold.seconds,
            },
            "warm": asdict(cold.warm),
            "prompt_tokens": PROMPT,
            "tasks": [
                {
                    "name": task.name,
                    "limited_by": task.limited_by,
                    "mixchat": task.rates,
                    "limit": task.limit_rates,
                    # tests/benchmarks/side_by_side.py fills these two.
                    "llama.cpp": [],
                    "to_peer": None,
                    "of_limit": task.of_limit,
                }
                for task in bench.tasks
            ],
        }


def task_table(tasks: Sequence[BenchTask]) -> list[tuple[str, ...]]:
    """Return a head and a row for each task, as cells."""
    rows: list[tuple[str, ...]] = [("", "TOK/S", "MIN - MAX", "OF THE LIMIT")]
    for task in tasks:
        spread = f"{min(task.rates):.1f} - {max(task.rates):.1f}"
        limit = f"{task.of_limit:.0%} ({task.limited_by})"
        rows.append((task.name, f"{median(task.rates):.1f}", spread, limit))
    return rows


def _parts(prompt: PromptTime) -> str:
    reading = f"waiting for {prompt.bytes_read / 1e9:.2f} GB of experts"
    waited = f"{prompt.waiting:.2f} s {reading}, " if prompt.bytes_read else ""
    return f"{waited}{prompt.computing:.2f} s computing"


def _machine(bench: Bench) -> str:
    threads = format_count(torch.get_num_threads(), "thread")
    kernels = f"{instruction_set()} kernels"
    other_gpus = " and other GPUs" if "other-device" in bench.engine.slots_by_tier else ""
    devices = f"{bench.engine.device}{other_gpus}"
    return f"{machine.cpu_name()}: {threads}, {kernels}, computing on {devices}"


def _model(bench: Bench) -> str:
    config = bench.blueprint.config
    stored = bench.blueprint.quantization
    dense = str(stored.dtype).removeprefix("torch.")
    types = {"experts": stored.quant_type, "attention": stored.attention, "head": stored.head}
    in_words = ", ".join(
        f"{matrices} in {weight_type(quant_type, dense)}" for matrices, quant_type in types.items()
    )
    return (
        f"{config.num_moe_layers} layers of {config.num_local_experts} experts, "
        f"{config.num_experts_per_tok} a token; {in_words}"
    )
