"""The result of `mixchat plan`, with its verdict and the next command."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from mixchat.base.quantities import format_age, format_count, format_least, format_size
from mixchat.cli.output import plan_text
from mixchat.cli.output.plan_text import section, speed_text
from mixchat.cli.output.reports import DownloadReport, Report, aligned, disk_as_json
from mixchat.install.known_models import KNOWN
from mixchat.install.make.outline import Outline
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.planning.expectation import LONG_PROMPT, PROMPT, Cost, in_words
from mixchat.planning.plan import MachinePlan, ModelPlan

_REASON_WIDTH = 66  # columns


@dataclass(frozen=True)
class PlanReport(Report):
    """The plan of a model on a machine: if it fits, how fast it is and what to type."""

    outline: Outline
    plan: MachinePlan

    @property
    def command(self) -> str | None:
        """Return the command that downloads or runs the model, None if it does not fit."""
        outline = self.outline
        if outline.lacking:
            return None
        if not outline.installed:
            return shlex.join(("mixchat", "download", *outline.arguments))
        options = self.plan.model.fit.options
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
        outline = self.outline
        plan = self.plan
        here = "the machine" if plan.told.is_another else "this machine"
        title = f"{outline.name} on {here}"
        if plan.recommended:
            title = f"Recommended for {here}: {outline.name}"
        texts = [section(title, aligned([*self.verdict()]))]
        if plan.known:  # which says of each model what it needs
            texts.append(section(f"Known models on {here}", plan_text.known_models(plan)))
        elif plan.offered_sizes:
            texts.append(section("With experts in fewer bits", plan_text.sizes(plan)))
        texts.append(f"{self._basis()}\n{plan_text.HELP}")
        return "\n\n".join(texts)

    def as_json(self) -> dict[str, Any]:
        outline = self.outline
        plan = self.plan
        fit = plan.model.fit
        speed = plan.model.speed
        rate = speed.tokens_per_second
        cost = speed.token
        return {
            "model": outline.name,
            "path": str(outline.directory),
            "kept": outline.installed,
            "kept_bytes": outline.blueprint.weights_size,
            "quantization": outline.blueprint.quantization.description(),
            "left_out": outline.blueprint.config.left_out,
            "fits": not outline.lacking,
            "disk": disk_as_json(outline.disk),
            **_model_as_json(plan.model),
            "together": rate and speed.answers * rate,
            "tokens_per_second_at_full_context": plan.model.at_full_context,
            "verdict": rate and in_words(rate),
            "recommended": plan.recommended is not None,
            "command": self.command,
            "told": asdict(plan.told),
            "machine": asdict(plan.machine),
            "reason": plan.reason,
            "speeds": asdict(speed.speeds),
            "fit": {
                "context": fit.context,
                "checkpoints": fit.checkpoints,
                "parallel": fit.options.parallel,
                "largest_context": fit.largest_context,
                "demand": asdict(fit.demand),
                "placement": asdict(fit.placement),
            },
            "hit_rate": speed.hit_rate,
            "host_hit_rate": speed.host_hit_rate,
            "cost": cost and _cost_as_json(cost),
            "prompts": [
                {"tokens": tokens} | _cost_as_json(prompt)
                for tokens in (PROMPT, LONG_PROMPT)
                if (prompt := speed.prompt(tokens))
            ],
            "sizes": [
                {"bits": bits, "kept_bytes": model.fit.blueprint.weights_size}
                | {"demo_loss": dict(zip(("plain", "calibrated"), DEMO_LOSS[bits], strict=True))}
                | _model_as_json(model)
                for bits, model in plan.offered_sizes.items()
            ],
            "slower_sizes": plan.slower_sizes,
            "known_models": [
                {"names": names, "bytes": plan.catalog[names].weights_size}
                | {
                    "download_bytes": KNOWN[names[0]].fetched_bytes,
                    "gpqa": {name: asdict(score) for name in names if (score := KNOWN[name].score)},
                }
                | (
                    {"problem": model}
                    if isinstance(model, str)
                    else {"problem": None, **_model_as_json(model)}
                )
                for names, model in plan.known.items()
            ],
            "download": outline.download and DownloadReport(outline.download).as_json(),
        }

    def verdict(self) -> Iterator[tuple[str, str]]:
        """Yield the lines on the fit, the speed and the next command."""
        outline = self.outline
        plan = self.plan
        speed = self.plan.model.speed
        for need in outline.lacking:
            disk = f" in {need.place}" if plan.told.free_disk is None else ""
            yield (
                "it does not fit",
                f"needs {format_least(need.needed)} of disk while downloading; "
                f"{format_size(need.free)} are free{disk}",
            )
        if not outline.lacking:
            is_here = outline.installed and not plan.told.is_another
            yield "it runs here" if is_here else "it fits", self._places()
        if not plan.recommended:
            yield from plan_text.needs(outline, plan)
        rate = speed.tokens_per_second
        answers = speed.answers
        text = speed_text(rate)
        if rate and answers > 1:
            together = speed_text(answers * rate)
            text = f"{text} for each of {answers} answers at once, {together} together"
        yield "speed", f"{text}, {in_words(rate)}" if rate else text
        if not plan.recommended:
            yield from plan_text.pace(plan)
        gpus = () if plan.machine.free.device is None else speed.speeds.gpus
        if gpus and gpus[0].source != "measured":
            yield "", f"the GPU's speed is an estimate by {gpus[0].source}, not measured"
            times = 1e6 * gpus[0].kernel, 1e6 * gpus[0].round_trip
            yield "", "assumed: {:.1f} us for a kernel, {:.0f} us for a wait".format(*times)
        elif speed.speeds.is_busy:
            yield "", "measured on a busy machine: use --measure when it is idle"
        if plan.recommended:
            yield from plan_text.size_and_quality(outline)
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

    def _basis(self) -> str:
        """Return what the speeds follow from."""
        plan = self.plan
        told = plan.told
        age = format_age(time.time() - plan.model.speed.speeds.measured_at)
        if not told.is_another:
            return f"Speeds are estimates by one measurement of this machine ({age})."
        own = {
            "RAM": told.ram is None,
            "GPU": plan.machine.gpus and not told.gpus,
            "disk": told.disk_speed is None,
        }
        *parts, last = ["CPU", *(name for name, is_own in own.items() if is_own)]
        names = f"{', '.join(parts)} and {last}" if parts else last
        return f"Estimates with this machine's {names} (measured {age})."

    def _places(self) -> str:
        """Return where the experts are."""
        free = self.plan.machine.free
        placement = self.plan.model.speed.placement
        first = sum(placement.by_device)
        held = placement.held
        gpus = "on the GPUs" if free.other_gpus else "on the GPU"
        tier = "in RAM" if free.device is None else gpus
        tiers = [f"{first} of {format_count(placement.experts, 'expert')} {tier}"]
        if held > first:
            tiers.append(f"{held - first} in RAM")
        if held < placement.experts:
            tiers.append(f"{placement.experts - held} read from disk")
        return ", ".join(tiers)


def _model_as_json(model: ModelPlan) -> dict[str, Any]:
    return {
        "device": str(model.speed.device),
        "held": model.speed.placement.held,
        "tokens_per_second": model.speed.tokens_per_second,
    }


def _cost_as_json(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"seconds": cost.seconds}
