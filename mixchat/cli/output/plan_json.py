"""The plan of `mixchat plan` as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mixchat.cli.output import download_text
from mixchat.cli.output.plan_verdict import next_command
from mixchat.planning.hardware import GPU_BUS, GPU_COMPUTE, GPU_MEMORY
from mixchat.planning.prompts import LONG_PROMPT, PROMPT

if TYPE_CHECKING:
    from mixchat.planning.expectation import TokenCost
    from mixchat.planning.plan import MachinePlan, Upgrade, Variant
    from mixchat.planning.worker_split import WorkerSplit
    from mixchat.weights.make.outline import Outline


def plan_as_dict(found: Outline, plan: MachinePlan) -> dict[str, Any]:
    """Return a plan for programs: bytes, seconds, tokens per second."""
    fit, expected, first, prompt = plan.fit, plan.expected, plan.first_token, plan.prompt
    return {
        "model": found.name,
        "path": str(found.directory),
        "kept": found.installed,
        "kept_bytes": found.blueprint.size,
        "quantization": found.blueprint.quantization.description(),
        "fits": not found.lacking,
        "disk": download_text.disk_as_dicts(found.disk),
        "tokens_per_second": expected.tokens_per_second,
        "together": expected.together and asdict(expected.together),
        "verdict": expected.speed and expected.speed.in_words,
        "command": next_command(found, plan),
        "told": asdict(plan.told),
        "assumed": _assumed(plan),
        "machine": asdict(plan.machine),
        "device": str(plan.device),
        "speeds": asdict(plan.measurement.typical),
        "fit": {
            "context": fit.context,
            "parallel": fit.options.parallel,
            "largest_context": fit.largest_context,
            "demand": asdict(fit.demand),
            "placement": asdict(fit.placement),
        },
        "held": expected.held,
        "hit_rate": expected.hit_rate,
        "host_hit_rate": expected.host_hit_rate,
        "cost": _cost_as_dict(expected.cost),
        "speed": expected.speed and asdict(expected.speed),
        "measured_at": plan.measurement.measured_at,
        "measured_on": {"cpu": plan.measurement.cpu, "directory": plan.measurement.directory},
        "busy": plan.measurement.busy,
        "samples": len(plan.measurement.samples),
        "prompt": prompt and asdict(prompt) | {"tokens": LONG_PROMPT},
        "first_token": first and asdict(first) | {"seconds": first.seconds, "tokens": PROMPT},
        "in_3_bits": plan.in_3_bits and _form_as_dict(plan.in_3_bits),
        "workers": plan.spread and _spread_as_dict(plan, plan.spread),
        "what_more_buys": [_more_as_dict(more) for more in plan.more],
        "download": None
        if found.download is None
        else download_text.download_as_dict(found.download),
    }


def _assumed(plan: MachinePlan) -> dict[str, float] | None:
    """Return the speeds of a GPU that could not be measured, None if none is assumed."""
    if not plan.gpu_is_assumed:
        return None
    return {"gpu_memory": GPU_MEMORY, "gpu_bus": GPU_BUS, "gpu_compute": GPU_COMPUTE}


def _form_as_dict(form: Variant) -> dict[str, Any]:
    expected = form.expected
    return {
        "kept_bytes": form.fit.blueprint.size,
        "held": expected.held,
        "tokens_per_second": expected.tokens_per_second,
        "speed": expected.speed and asdict(expected.speed),
    }


def _cost_as_dict(cost: TokenCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return asdict(cost) | {"seconds": cost.seconds, "hidden": cost.hidden}


def _spread_as_dict(plan: MachinePlan, spread: WorkerSplit) -> dict[str, Any]:
    expected, of_workers = spread.expected, zip(spread.offers, spread.held, strict=True)
    return {
        "offers": [asdict(offer) | {"held": held} for offer, held in of_workers],
        "experts": {
            "here": spread.here,
            "copies": spread.copies,
            "workers": spread.on_workers,
            "disk": plan.fit.placement.experts - expected.held,
        },
        "tokens_per_second": expected.tokens_per_second,
        "hit_rate": expected.hit_rate,
        "host_hit_rate": expected.host_hit_rate,
        "cost": _cost_as_dict(expected.cost),
        "speed": expected.speed and asdict(expected.speed),
    }


def _more_as_dict(more: Upgrade) -> dict[str, Any]:
    return {
        "tier": more.tier,
        "bytes": more.bytes,
        "placement": asdict(more.fit.placement),
        "tokens_per_second": more.expected.tokens_per_second,
        "speed": more.expected.speed and asdict(more.expected.speed),
    }
