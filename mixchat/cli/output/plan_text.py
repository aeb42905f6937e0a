"""The lines and tables of a plan as text for a person."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mixchat.base.quantities import format_rate, format_size, format_time
from mixchat.cli.output.reports import aligned
from mixchat.experts.memory import CPU
from mixchat.install.known_models import KNOWN
from mixchat.install.make.outline import Outline
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.planning.expectation import LONG_PROMPT, PROMPT
from mixchat.planning.plan import MachinePlan, ModelPlan

# The words of a rise of the demo's perplexity that is lower than each limit. It rises by 17% in 4
# bits and by 42% in 3. The published figures of Mixtral are 2.3% (Q4_0) and 4.5% (Q3_K_M).
_QUALITY = ((0.25, "good"), (0.5, "fair"), (1.0, "low"), (math.inf, "poor"))

HELP = "'mixchat plan --help' explains how to read this."


def section(title: str, text: str) -> str:
    """Return a title and the lines of a text, indented."""
    lines = "\n".join(f"  {line}" for line in text.splitlines())
    return f"{title}\n{lines}"


def needs(outline: Outline, plan: MachinePlan) -> Iterator[tuple[str, str]]:
    """Yield what the model needs of memory and disk, and what is free."""
    fit = plan.model.fit
    free = plan.machine.free
    told = plan.told
    demand = fit.demand
    assumed = ", assumed" if told.ram else f", limited by {free.limit}" if free.limit else ""
    yield "RAM", f"{format_size(free.host)} of {format_size(plan.machine.memory)} free{assumed}"
    frees = [free.device or 0, *free.other_gpus.values()]
    for number, (card, bytes_free) in enumerate(zip(plan.machine.gpus, frees, strict=False)):
        memory = f"{format_size(bytes_free)} of {format_size(card.memory)} free"
        yield card.device if number else "GPU", f"{card.name}, {memory}"
    each = f" for each of {fit.options.parallel} answers" if fit.options.parallel > 1 else ""
    yield (
        "needs",
        f"{format_size(demand.whole)} of experts, {format_size(demand.shared)} of shared weights",
    )
    tokens = f"{fit.context:,} tokens"
    if fit.checkpoints:
        tokens += f" with {fit.checkpoints} checkpoints of states"
    yield "context", f"{format_size(demand.context)} for {tokens}{each}"
    if fit.largest_context > fit.context:
        yield "", f"{fit.largest_context:,} tokens fit, with fewer experts in memory"
    when = "installed" if outline.installed else "once it is downloaded"
    size = format_size(outline.blueprint.weights_size)
    yield "disk", f"{size}, {when}; {format_size(plan.machine.disk_free)} free"


def pace(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    """Yield the seconds of a token and of prompts, and the speed of the disk."""
    speed = plan.model.speed
    if (cost := speed.token) is not None:
        parts = {
            "computing": cost.computing + cost.waiting,
            "copying": cost.copying,
            "reading": cost.reading,
        }
        texts = [f"{name} {_time(seconds)}" for name, seconds in parts.items() if seconds]
        meanwhile = f" ({_time(cost.hidden)} meanwhile)" if cost.hidden else ""
        yield "", f"{_time(cost.seconds)} a token: {', '.join(texts)}{meanwhile}"
        full = speed_text(plan.model.at_full_context)
        yield "", f"{full} once the context holds {plan.model.fit.context:,} tokens"
    if slower := plan.slower_sizes:
        yield "", f"the GPU holds all experts in 4 bits; slower in {', '.join(slower)} bits"
    costs = {tokens: speed.prompt(tokens) for tokens in (LONG_PROMPT, PROMPT)}
    times = [f"{tokens} tokens in {_time(cost.seconds)}" for tokens, cost in costs.items() if cost]
    if times:
        yield "prompt", f"reads {', '.join(times)} once loaded"
    if speed.speeds.disk_idle is None:
        yield "", "the disk could not be measured: tell its speed with --disk-speed"


def sizes(plan: MachinePlan) -> str:
    """Return the table of sizes, by arithmetic from the figures of the first."""
    rows = [("bits", "disk", "held", "tok/s", "quality (rise of perplexity)")]
    for bits, model in plan.offered_sizes.items():
        plain, calibrated = DEMO_LOSS[bits]
        rise = calibrated if plain is None else plain
        word = next(word for limit, word in _QUALITY if rise < limit)
        placement = model.speed.placement
        rows.append(
            (
                bits,
                format_size(model.fit.blueprint.weights_size),
                f"{placement.held / placement.experts:.0%}",
                rate_text(model.speed.tokens_per_second),
                f"{word} (demo +{rise:.0%}, larger models less)",
            )
        )
    plain_only = [(bits, after) for bits, (plain, after) in DEMO_LOSS.items() if plain is not None]
    gains = " and ".join(f"{bits} bits to +{after:.0%}" for bits, after in plain_only)
    return (
        f"{aligned(rows)}\n"
        f"'mixchat download NAME --expert-bits BITS' installs one. --calibrate takes the\n"
        f"demo in {gains}. A download calibrates the others."
    )


def known_models(plan: MachinePlan) -> str:
    """Return the table of the known models, by arithmetic from the figures of the planned one."""
    rows = [("model", "download", "disk", "tok/s", "GPQA", "experts")]
    for names, model in plan.known.items():
        size = format_size(plan.catalog[names].weights_size)
        scores = [
            f"{score.percent:.0f}%" if (score := KNOWN[name].score) else "-" for name in names
        ]
        planned = ("-", model) if isinstance(model, str) else _rate_and_places(model)
        row = (", ".join(names), f"{KNOWN[names[0]].fetched_gb} GB", size, planned[0])
        rows.append((*row, ", ".join(dict.fromkeys(scores)), planned[1]))
    return aligned(rows)


def _rate_and_places(model: ModelPlan) -> tuple[str, str]:
    """Return the speed and the places of the experts, as cells of a table."""
    placement = model.speed.placement
    on_gpu = 0 if model.speed.device == CPU else sum(placement.by_device)
    counts = {
        "GPU": on_gpu,
        "RAM": placement.held - on_gpu,
        "disk": placement.experts - placement.held,
    }
    shares = [f"{count / placement.experts:.0%} {tier}" for tier, count in counts.items() if count]
    return rate_text(model.speed.tokens_per_second), " ".join(shares)


def size_and_quality(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield the sizes and the quality of a known model."""
    known = KNOWN[outline.name]
    size = f"{format_size(outline.blueprint.weights_size)} of disk"
    yield "size", size if outline.installed else f"{known.fetched_gb} GB to download, then {size}"
    if score := known.score:
        yield "quality", f"{score.percent:.0f}% in GPQA, as its maker published ({score.date})"
    else:
        yield "quality", "no score in GPQA is known"


def _time(seconds: float) -> str:
    if seconds < 0.9995:  # above that, 1e+03 ms
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else format_time(seconds)


def speed_text(tokens_per_second: float | None) -> str:
    """Return a speed, or the reason why it is unknown."""
    if tokens_per_second is None:
        return "unknown, because the disk could not be measured"
    return f"{rate_text(tokens_per_second)} tok/s"


def rate_text(tokens_per_second: float | None) -> str:
    """Return a speed as a cell of a table."""
    return "unknown" if tokens_per_second is None else format_rate(tokens_per_second)
