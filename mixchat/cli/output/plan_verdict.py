"""The verdict of `mixchat plan`: whether a model fits, how fast it is and what to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mixchat.base.quantities import format_least, format_rates, format_size

if TYPE_CHECKING:
    from mixchat.planning.expectation import SpeedRange
    from mixchat.planning.plan import MachinePlan
    from mixchat.weights.make.outline import Outline


def verdict(found: Outline, plan: MachinePlan) -> Iterator[tuple[str, str]]:
    """Yield three lines: whether it fits, how fast it is and what to type."""
    for need in found.lacking:
        missing = format_least(need.needed - need.free)
        place = f" in {need.place}" if plan.told.free_disk is None else ""
        yield (
            "it does not fit",
            f"{missing} of disk are missing: the download takes up to "
            f"{format_least(need.needed)}{place}, {format_size(need.free)} are free",
        )
    if not found.lacking:
        here = found.installed and not plan.told.is_another
        yield "it runs here" if here else "it fits", _held(plan)
    yield "speed", _speed_in_words(plan)
    if command := next_command(found, plan):
        yield "type", command
    else:
        yield "to do", "free some space, or set MIXCHAT_HOME to a directory on a larger disk"


def _held(plan: MachinePlan) -> str:
    """Return where the experts are, the fastest memory first."""
    placement, expected = plan.fit.placement, plan.expected
    first = sum(placement.by_device)
    where = "in RAM" if plan.machine.free.device is None else f"on {gpus_text(plan)}"
    parts = [f"{first} of {count_text(placement.experts, 'expert')} {where}"]
    if expected.held > first:
        parts.append(f"{expected.held - first} in RAM")
    if expected.held < placement.experts:
        parts.append(f"{placement.experts - expected.held} on disk, read when a token needs them")
    return ", ".join(parts)


def _speed_in_words(plan: MachinePlan) -> str:
    expected, text = plan.expected, speed_text(plan.expected.speed)
    if plan.spread is not None:
        workers = count_text(len(plan.spread.offers), "worker")
        beside = f"{text} without" if expected.answers == 1 else "one answer at a time"
        expected = plan.spread.expected
        text = f"{speed_text(expected.speed)} with {workers}, {beside}"
    elif expected.answers > 1 and expected.speed is not None:
        together = speed_text(expected.together)
        text = f"{text} for each of {expected.answers} answers at once, {together} together"
    if expected.speed is not None:
        text += f", {expected.speed.in_words}"
    if plan.gpu_is_assumed:
        return f"{text} (of a GPU whose speed is assumed)"
    return f"{text} (measured on a busy machine)" if plan.measurement.busy else text


def next_command(found: Outline, plan: MachinePlan) -> str | None:
    """Return what to type next: what downloads the model, or what runs it as it was planned."""
    if found.lacking:
        return None
    if not found.installed:
        return shlex.join(("mixchat", "download", *found.arguments))
    options = plan.fit.options
    serves = ("serve", "-m", found.name, "--parallel", str(options.parallel))
    run = serves if options.parallel > 1 else ("run", "-m", found.name)
    flags = {
        "--ctx-size": options.context_size,
        "--kv-bits": options.kv_bits,
        "--device": options.device,
        "--host-memory": options.host_memory,
        "--device-memory": ",".join(map(str, options.device_memory)) or None,
        "--worker": " --worker ".join(options.workers) or None,
    }
    given = (f"{flag} {value}" for flag, value in flags.items() if value is not None)
    return " ".join((shlex.join(("mixchat", *run)), *given))


def speed_text(speed: SpeedRange | None) -> str:
    """Return a speed, or why it is not known."""
    if speed is None:
        return "unknown, because the disk could not be measured"
    return f"{format_rates(speed.low, speed.high)} tok/s"


def gpus_text(plan: MachinePlan) -> str:
    """Return what a sentence calls the GPUs."""
    return "the GPUs" if plan.machine.free.others else "the GPU"


def count_text(count: int, unit: str) -> str:
    """Return `1 layer` or `2 layers`."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
