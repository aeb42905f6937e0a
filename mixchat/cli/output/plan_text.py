"""The sections of a plan as text for a person."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from datetime import datetime

from mixchat.base.quantities import (
    format_age,
    format_count,
    format_rates,
    format_size,
    format_time,
    format_times,
)
from mixchat.cli.output.reports import aligned
from mixchat.experts.memory import CPU
from mixchat.install.make.outline import Outline
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.planning import gpu_speeds
from mixchat.planning.expectation import LONG_PROMPT, SpeedRange, TokenCost
from mixchat.planning.gpu_cost import token_kernels
from mixchat.planning.machine_speeds import IN_USE
from mixchat.planning.plan import MachinePlan
from mixchat.planning.routing import repeats_as_mixtral

# The words of a rise of the demo's perplexity that is lower than each limit. It rises by 17% in 4
# bits and by 42% in 3. The published figures of Mixtral are 2.3% (Q4_0) and 4.5% (Q3_K_M).
_QUALITY = ((0.25, "good"), (0.5, "fair"), (1.0, "low"), (math.inf, "poor"))


def sections(outline: Outline, plan: MachinePlan) -> Iterator[str]:
    """Yield the sections of a plan after its verdict."""
    yield section("the machine" if plan.told.is_another else "this machine", _machine(plan))
    yield section(f"the model: {outline.name}", _model(outline, plan))
    yield section("what goes where", _places(plan))
    yield section("what to expect", _expected(plan))
    if plan.sizes:
        yield section("with experts in fewer bits", _sizes(plan))


def section(title: str, content: str | Iterable[tuple[str, str]]) -> str:
    """Return a title and indented lines, from a text or from rows of cells."""
    text = content if isinstance(content, str) else aligned(list(content))
    return f"{title[0].upper()}{title[1:]}\n{indented(text)}"


def indented(text: str) -> str:
    """Return the lines with two spaces before each."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def _machine(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    there, told = plan.machine, plan.told
    not_told = ", this machine's" if told.is_another else ""
    yield "CPU", f"{there.cpu}, {format_count(there.cores, 'core')}{not_told}"
    limit = f" (limit: {there.free.limit})" if there.free.limit else ""
    yield "RAM", f"{_memory(there.memory, there.free.host, '--ram' if told.ram else None)}{limit}"
    if there.gpu_memory is not None and there.free.device is not None:
        flag = "--gpu" if told.gpus else None
        yield "GPU", f"{there.gpu}, {_memory(there.gpu_memory, there.free.device, flag)}"
        for card in there.other_gpus:
            free = there.free.other_gpus[card.device]
            yield card.device, f"{card.name}, {_memory(card.memory, free, flag)}"
    elif plan.device.type == "cpu":
        yield "GPU", "not used"
    yield from _disk(plan)
    measurement, speeds = plan.measurement, plan.measurement.typical
    reading = f"reading {_rate(speeds.memory_bandwidth)} of weights"
    yield "expert", f"takes {_time(speeds.expert_time(1))} for a token on the CPU, {reading}"
    yield from _gpus(plan)
    when = datetime.fromtimestamp(measurement.measured_at).strftime("%Y-%m-%d %H:%M")
    age = format_age(time.time() - measurement.measured_at)
    samples = format_count(len(measurement.samples), "sample")
    yield "measured", f"{when} ({age}), {samples}; --measure measures again"
    yield "", f"on {measurement.cpu}, and the disk of {measurement.directory}"
    if measurement.busy:
        yield "", "measured on a busy machine: better figures come when it is idle"


# Where the figures of a GPU come from.
_ORIGINS = {"measured": "measured", "card": "data sheet", "assumed": "assumed"}


def _gpus(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    """Yield the figures of the GPUs, and which are measured, known and assumed."""
    for number, card in enumerate(plan.gpus):
        figures = (
            f"{_rate(card.memory)} from its memory, {_rate(card.bus)} from RAM, "
            f"{card.compute / 1e12:.3g} TFLOP/s"
        )
        yield "speed" if not number else f"cuda:{number}", f"{figures} ({_ORIGINS[card.origin]})"
    if not plan.gpus:
        return
    for origin in ("measured", "assumed"):
        parts = [
            f"{share:.0%} for {name}"
            for name, (share, known) in plan.types_on_gpu.items()
            if known == origin
        ]
        if parts:
            yield origin, f"kernels reach of that memory's speed {', '.join(parts)}"
    kernels = token_kernels(plan.fit.blueprint.config)
    each, wait = (1e6 * seconds for seconds in (gpu_speeds.KERNEL_S, gpu_speeds.SYNC_S))
    yield "assumed", f"{each:.0f} us for each of {kernels} kernels, {wait:.0f} us a wait"
    if plan.gpus[0].origin != "measured":
        # The figures above contain both parts.
        bus, compute = gpu_speeds.BUS_PART, gpu_speeds.COMPUTE_PART
        yield "", f"{bus:.0%} of the data sheet's bus, and {compute:.0%} of its TFLOP/s"


def _memory(size: int, free: int, flag: str | None) -> str:
    """Return a memory's size, and how much is free. `flag` has told the size."""
    if flag:
        return f"{format_size(size)} (from {flag}), {format_size(free)} free (assumed)"
    return f"{format_size(size)}, {format_size(free)} free"


def _disk(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    speeds, told, of_it = plan.measurement.typical, plan.told, f"tokens get {IN_USE:.0%} of it"
    origin = " (from --free-disk)" if told.free_disk is not None else ""
    yield "disk", f"{format_size(plan.machine.disk_free)} free{origin}"
    if told.disk_speed is not None:
        yield "", f"reads {_rate(told.disk_speed)} (from --disk-speed; {of_it})"
    elif speeds.disk_bandwidth is None or speeds.disk_bandwidth_idle is None:
        yield "", "not measured: it cannot be written to, or has no room; see --disk-speed"
    else:
        yield "", f"reads {_rate(speeds.disk_bandwidth_idle)} ({of_it})"
        busy = f"{_rate(speeds.disk_bandwidth)} while the CPU computes"
        if speeds.disk_bandwidth_fresh is not None:
            busy += f", {_rate(speeds.disk_bandwidth_fresh)} in a cold start"
        yield "", busy


def _model(outline: Outline, plan: MachinePlan) -> Iterator[tuple[str, str]]:
    config, demand = outline.blueprint.config, plan.fit.demand
    of_a_layer = f"{config.num_experts_per_tok} of {config.num_local_experts} a token"
    smaller = min(form.stride for form in outline.blueprint.expert_forms)
    sizes = dict.fromkeys([format_size(smaller), format_size(demand.expert)])
    each = f"{demand.experts} of {' to '.join(sizes)} each"
    stored = outline.blueprint.quantization
    came_so = stored.scales == "given" and stored.quant_type != "none"
    came = f" in {stored.quant_type}, as published" if came_so else ""
    yield (
        "experts",
        f"{format_size(demand.whole)}{came}: {each}, {of_a_layer} in each of "
        f"{config.num_moe_layers} layers",
    )
    yield "shared", f"{format_size(demand.shared)}: the weights that every token needs"
    parallel = plan.fit.options.parallel
    each = f" for each of {parallel} answers at once" if parallel > 1 else ""
    chosen = "" if plan.fit.options.context_size else ", chosen by the free memory"
    size, tokens = format_size(demand.context), f"{plan.fit.context:,} tokens"
    if plan.fit.checkpoints:
        tokens += f" with {plan.fit.checkpoints} checkpoints of states"
    yield "context", f"{size} for {tokens}{each}{chosen}"
    when = "installed" if outline.installed else "once it is downloaded"
    yield "disk", f"{format_size(outline.blueprint.weights_size)}, {when}"


def _places(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    demand, placement, free = plan.fit.demand, plan.fit.placement, plan.machine.free
    slots = f"{placement.slots} of {format_count(placement.experts, 'expert')}, the shared weights"
    if free.device is None:
        spare = free.host - demand.shared - demand.taken(placement.slots)
        yield "RAM", f"{slots}; {format_size(spare)} left free"
        if spare < demand.context + placement.reserve:
            yield "", "as the context fills, fewer experts fit"
    else:
        spare = free.device - demand.beside_experts - demand.taken(placement.slots)
        yield "GPU", f"{slots}, the context; {format_size(spare)} left free"
        for (name, size), count in zip(free.other_gpus.items(), placement.other_slots, strict=True):
            spare = size - count * demand.expert
            unused = "not used, for two experts do not fit"
            held = format_count(count, "expert") if count else unused
            yield name, f"{held}; {format_size(spare)} left free"
        # RAM may have slots for more. What the GPUs hold is not in RAM, too.
        host = plan.expected.held - sum(placement.by_device)
        spare = free.host - host * demand.expert
        behind = format_count(host, "expert") if host else "no experts"
        yield "RAM", f"{behind}; {format_size(spare)} left free"
    unheld = placement.experts - plan.expected.held
    later = f"the other {format_count(unheld, 'expert')}, read when a token needs them"
    yield "disk", later if unheld else "not used after loading"


def _expected(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    expected = plan.expected
    if expected.cost is None:
        yield "decode", speed_text(None)
    else:
        each = " for each answer" if expected.answers > 1 else ""
        pace = f"{speed_text(expected.speed)}{each}"
        yield "decode", f"{pace}: a token takes {_time(expected.cost.seconds)}"
        yield from (("", reason) for reason in _reasons(expected.cost))
        if expected.answers > 1:
            together = speed_text(expected.together)
            yield "together", f"{together} of {expected.answers} answers at once"
    hits = f"{expected.hit_rate:.0%} of the experts that tokens use"
    if plan.machine.free.device is None:
        yield "cache hits", f"{hits} are in RAM"
    else:
        held = f"{hits} are on {gpus_text(plan)}"
        yield "cache hits", f"{held}, {expected.host_hit_rate:.0%} there or in RAM"
    config = plan.fit.blueprint.config
    if expected.hit_rate < 1 and not repeats_as_mixtral(config):
        shape = f"{config.num_experts_per_tok} of {config.num_local_experts}"
        yield "", f"assuming that all are chosen alike: no figures are published for {shape}"
    if plan.prompt is not None:
        rates = format_rates(plan.prompt.low, plan.prompt.high)
        seconds = format_times(LONG_PROMPT / plan.prompt.high, LONG_PROMPT / plan.prompt.low)
        yield "prompt", f"{rates} tok/s: {LONG_PROMPT} tokens are read in {seconds}"
    if (warm := plan.warm) is not None:
        seconds = format_times(warm.low, warm.high)
        yield "first token", f"after {seconds} for a prompt of {warm.tokens} tokens, once loaded"
        yield from (("", reason) for reason in _reasons(warm.prompt))
    if (cold := plan.cold) is not None:
        start_s = plan.starting + cold.loading
        seconds = format_times(start_s + cold.low, start_s + cold.high)
        yield "cold start", f"{seconds} from Enter in the shell to that token, nothing in memory"
        yield "", f"{_time(plan.starting)} starting Python and its libraries"
        yield "", f"{_time(cold.loading)} loading the shared weights"
        yield from (("", reason) for reason in _reasons(cold.prompt))
    fewer = ", with fewer experts in memory" if plan.fit.largest_context > plan.fit.context else ""
    yield "context", f"up to {plan.fit.largest_context:,} tokens fit{fewer}"


def _sizes(plan: MachinePlan) -> str:
    """Return the table of sizes, by arithmetic from the figures of the first."""
    rows = [("bits", "disk", "held", "tok/s", "quality (rise of perplexity)")]
    for size in plan.sizes:
        plain, calibrated = DEMO_LOSS[size.bits]
        rise = calibrated if plain is None else plain
        word = next(word for limit, word in _QUALITY if rise < limit)
        expected, experts = size.expected, size.fit.placement.experts
        rows.append(
            (
                size.bits,
                format_size(size.fit.blueprint.weights_size),
                f"{expected.held / experts:.0%}",
                rates_text(expected.speed),
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


def _reasons(cost: TokenCost) -> Iterator[str]:
    yield f"{_time(cost.computing)} computing"
    if cost.waiting:
        missed = f"{_number(cost.missed)} experts that the CPU computes meanwhile"
        yield f"{_time(cost.waiting)} waiting for {missed}"
    if cost.copied:
        yield f"{_time(cost.copying)} copying {_number(cost.copied)} experts from RAM to the GPU"
    if cost.read:
        yield f"{_time(cost.reading)} reading {_number(cost.read)} experts from disk"
    if cost.hidden:
        moving = "reading" if cost.read else "copying"
        yield f"-{_time(cost.hidden)}: {moving} and computing overlap"


def _number(count: float) -> str:
    return f"{count:.3g}" if count < 999.5 else f"{count:.0f}"


def known_models(plan: MachinePlan) -> str:
    """Return the table of the known models, by arithmetic from the figures of the planned one."""
    rows = [("model", "disk", "tok/s", "experts")]
    for model in plan.known:
        name, size = ", ".join(model.names), format_size(model.bytes)
        if model.fit is None or model.expected is None:
            rows.append((name, size, "-", model.problem or ""))
            continue
        held, experts = model.expected.held, model.fit.placement.experts
        by_device = model.fit.placement.by_device
        on_gpu = 0 if model.device == CPU else sum(by_device)
        counts = {
            f"on {'the GPUs' if len(by_device) > 1 else 'the GPU'}": on_gpu,
            "in RAM": held - on_gpu,
            "on disk": experts - held,
        }
        shares = [f"{count / experts:.0%} {tier}" for tier, count in counts.items() if count]
        rows.append((name, size, rates_text(model.expected.speed), ", ".join(shares)))
    age = format_age(time.time() - plan.measurement.measured_at)
    return f"{aligned(rows)}\nAll speeds follow from one measurement of this machine ({age})."


def _rate(bytes_per_second: float) -> str:
    return f"{format_size(int(bytes_per_second))}/s"


def _time(seconds: float) -> str:
    if seconds < 0.9995:  # above that, 1e+03 ms
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else format_time(seconds)


def speed_text(speed: SpeedRange | None) -> str:
    """Return a speed, or the reason why it is unknown."""
    if speed is None:
        return "unknown, because the disk could not be measured"
    return f"{format_rates(speed.low, speed.high)} tok/s"


def rates_text(speed: SpeedRange | None) -> str:
    """Return a speed as a cell of a table."""
    return "unknown" if speed is None else format_rates(speed.low, speed.high)


def gpus_text(plan: MachinePlan) -> str:
    """Return what a sentence calls the GPUs."""
    return "the GPUs" if plan.machine.free.other_gpus else "the GPU"
