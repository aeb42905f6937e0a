"""The result of `mixchat plan`, with its verdict and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from mixchat.base.quantities import format_count, format_least, format_size
from mixchat.cli.output import plan_text
from mixchat.cli.output.plan_text import gpus_text, section, speed_text
from mixchat.cli.output.reports import DownloadReport, Report, aligned, disk_as_json
from mixchat.install.make.outline import Outline
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.planning import gpu_speeds
from mixchat.planning.expectation import LONG_PROMPT, READING, Expectation, FirstToken, TokenCost
from mixchat.planning.gpu_cost import token_kernels
from mixchat.planning.plan import MachinePlan

_REASON_WIDTH = 66  # columns


@dataclass(frozen=True)
class PlanReport(Report):
    """The plan of a model on a machine.

    The first screen tells if the model fits, how fast it is and what to type. `details` adds the
    reasons.
    """

    outline: Outline
    plan: MachinePlan
    details: bool = False

    @property
    def command(self) -> str | None:
        """Return the command that downloads or runs the model, None if it does not fit."""
        outline = self.outline
        if outline.lacking:
            return None
        if not outline.installed:
            return shlex.join(("mixchat", "download", *outline.arguments))
        options = self.plan.fit.options
        serves = ("serve", "-m", outline.name, "--parallel", str(options.parallel))
        run = serves if options.parallel > 1 else ("run", "-m", outline.name)
        flags = {
            "--ctx-size": options.context_size,
            "--kv-bits": options.kv_bits,
            "--device": options.device,
            "--host-memory": options.host_memory,
            "--device-memory": ",".join(map(str, options.device_memory)) or None,
        }
        chosen = (f"{flag} {value}" for flag, value in flags.items() if value is not None)
        return " ".join((shlex.join(("mixchat", *run)), *chosen))

    def as_text(self) -> str:
        outline, plan = self.outline, self.plan
        # 65 lines hid the three that a person wants: does it fit, how fast, and what to type.
        here = "the machine" if plan.told.is_another else "this machine"
        lines = plan_text.indented(aligned(list(self.verdict())))
        texts = [f"{outline.name} on {here}\n{lines}"]
        if plan.known:
            texts.append(section(f"known models on {here}", plan_text.known_models(plan)))
        if self.details:
            texts += plan_text.sections(outline, plan)
            if not outline.installed and not plan.told.is_another:
                asks = f"'mixchat download {outline.name} --dry-run' asks the hub what it takes."
                needs = outline.download and DownloadReport(outline.download).as_text()
                texts.append(section("to download it", needs or asks))
        else:
            texts.append("--details shows the reasons, and experts in fewer bits.")
        return "\n\n".join(texts)

    def as_json(self) -> dict[str, Any]:
        outline, plan = self.outline, self.plan
        fit, expected, prompt = plan.fit, plan.expected, plan.prompt
        cost, measurement = expected.cost, plan.measurement
        return {
            "model": outline.name,
            "path": str(outline.directory),
            "kept": outline.installed,
            "kept_bytes": outline.blueprint.weights_size,
            "quantization": outline.blueprint.quantization.description(),
            "left_out": outline.blueprint.config.left_out,
            "fits": not outline.lacking,
            "disk": disk_as_json(outline.disk),
            **_speed_as_json(expected),
            "together": expected.together and asdict(expected.together),
            "verdict": expected.speed and expected.speed.in_words,
            "command": self.command,
            "told": asdict(plan.told),
            "gpus": [
                asdict(card)
                | {"efficiency": {name: share for name, (share, _) in plan.types_on_gpu.items()}}
                for card in plan.gpus
            ],
            "assumed": assumed_figures(plan),
            "machine": asdict(plan.machine),
            "device": str(plan.device),
            "reason": plan.reason,
            "speeds": asdict(measurement.typical),
            "fit": {
                "context": fit.context,
                "checkpoints": fit.checkpoints,
                "parallel": fit.options.parallel,
                "largest_context": fit.largest_context,
                "demand": asdict(fit.demand),
                "placement": asdict(fit.placement),
            },
            "held": expected.held,
            "hit_rate": expected.hit_rate,
            "host_hit_rate": expected.host_hit_rate,
            "cost": cost and _cost_as_json(cost),
            "measured_at": measurement.measured_at,
            "measured_on": {"cpu": measurement.cpu, "directory": measurement.directory},
            "busy": measurement.busy,
            "samples": len(measurement.samples),
            "prompt": prompt and asdict(prompt) | {"tokens": LONG_PROMPT},
            "first_token": {
                "starting": plan.starting,
                "cold": _first_token_as_json(plan.cold),
                "warm": _first_token_as_json(plan.warm),
            },
            "sizes": [
                {
                    "bits": size.bits,
                    "kept_bytes": size.fit.blueprint.weights_size,
                    "held": size.expected.held,
                    "demo_loss": dict(
                        zip(("plain", "calibrated"), DEMO_LOSS[size.bits], strict=True)
                    ),
                    **_speed_as_json(size.expected),
                }
                for size in plan.sizes
            ],
            "known_models": [
                {
                    "names": model.names,
                    "bytes": model.bytes,
                    "problem": model.problem,
                    "device": str(model.device),
                    "placement": model.fit and asdict(model.fit.placement),
                    "held": model.expected and model.expected.held,
                    **_speed_as_json(model.expected),
                }
                for model in plan.known
            ],
            "download": outline.download and DownloadReport(outline.download).as_json(),
        }

    def verdict(self) -> Iterator[tuple[str, str]]:
        """Yield the lines on the fit, the speed and the next command."""
        outline, plan = self.outline, self.plan
        for need in outline.lacking:
            disk = f" in {need.place}" if plan.told.free_disk is None else ""
            yield (
                "it does not fit",
                f"needs {format_least(need.needed)} of disk while downloading; "
                f"{format_size(need.free)} are free{disk}",
            )
        if not outline.lacking:
            is_here = outline.installed and not plan.told.is_another
            placement, held = plan.fit.placement, plan.expected.held
            first = sum(placement.by_device)
            tier = "in RAM" if plan.machine.free.device is None else f"on {gpus_text(plan)}"
            tiers = [f"{first} of {format_count(placement.experts, 'expert')} {tier}"]
            if held > first:
                tiers.append(f"{held - first} in RAM")
            if held < placement.experts:
                tiers.append(f"{placement.experts - held} read from disk")
            yield "it runs here" if is_here else "it fits", ", ".join(tiers)
        expected, text = plan.expected, speed_text(plan.expected.speed)
        if expected.answers > 1 and expected.speed is not None:
            together = speed_text(expected.together)
            text = f"{text} for each of {expected.answers} answers at once, {together} together"
        yield "speed", f"{text}, {expected.speed.in_words}" if expected.speed else text
        if plan.gpus and plan.gpus[0].origin != "measured":
            card = "a cheap card" if plan.gpus[0].origin == "assumed" else "the card's data sheet"
            yield "", f"the GPU's speed is predicted by {card}, not measured"
        elif plan.measurement.busy:
            yield "", "measured on a busy machine: use --measure when it is idle"
        if left_out := outline.blueprint.config.left_out:
            parts = f"parts for {' and '.join(left_out)}"
            is_text = {"images", "sound"} & {*left_out}
            yield ("text only", f"{parts} are left out") if is_text else ("left out", parts)
        for number, line in enumerate(wrap(plan.reason or "", _REASON_WIDTH)):
            yield "" if number else "device", line
        if self.command:
            yield "next", self.command
        elif plan.told.is_another and plan.told.free_disk is None:
            yield "next", "say how much the other machine's disk has, as in --free-disk 100GB"
        else:
            yield "next", "free some disk, or set MIXCHAT_HOME to a directory on a larger one"
        if faster := self._faster_model():
            yield "faster", faster

    def _faster_model(self) -> str | None:
        """Return how to get the largest known model at a reader's speed, if this one is slower."""
        plan, told = self.plan, self.plan.told
        if plan.expected.speed is None or plan.expected.speed.high >= READING:
            return None
        any_size = told.is_another and told.free_disk is None
        for model in reversed(plan.known):
            speed = model.expected and model.expected.speed
            has_room = any_size or model.bytes < plan.machine.disk_free
            if speed and speed.high >= READING and has_room:
                return f"mixchat download {model.names[0]} ({speed_text(speed)})"
        return None


def assumed_figures(plan: MachinePlan) -> dict[str, Any] | None:
    """Return the figures of GPUs that nobody measured or published, None without a GPU."""
    if not plan.gpus:
        return None
    types = [name for name, (_, origin) in plan.types_on_gpu.items() if origin == "assumed"]
    return {
        "efficiency": types,
        "kernels": token_kernels(plan.fit.blueprint.config),
        "kernel_seconds": gpu_speeds.KERNEL_S,
        "sync_seconds": gpu_speeds.SYNC_S,
        "bus_part": gpu_speeds.BUS_PART,
        "compute_part": gpu_speeds.COMPUTE_PART,
        "instructions_part": gpu_speeds.LANES_PART,
        "instructions_per_weight": {name: gpu_speeds.INSTRUCTIONS[name] for name in types},
    }


def _cost_as_json(cost: TokenCost) -> dict[str, Any]:
    return asdict(cost) | {"seconds": cost.seconds, "hidden": cost.hidden}


def _first_token_as_json(first: FirstToken | None) -> dict[str, Any] | None:
    if first is None:
        return None
    return asdict(first) | {"seconds": first.seconds, "prompt": _cost_as_json(first.prompt)}


def _speed_as_json(expected: Expectation | None) -> dict[str, Any]:
    speed = expected and expected.speed
    return {
        "tokens_per_second": expected and expected.tokens_per_second,
        "speed": speed and asdict(speed),
    }
