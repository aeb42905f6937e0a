"""The sections of a plan as text for a person."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from mixchat.base.quantities import format_age, format_rates, format_size, format_time, format_times
from mixchat.cli.output.reports import aligned
from mixchat.planning.hardware import GPU_BUS, GPU_COMPUTE, GPU_MEMORY
from mixchat.planning.machine_speeds import IN_USE
from mixchat.planning.plan import Variant
from mixchat.planning.prompts import LONG_PROMPT, PROMPT
from mixchat.planning.routing import repeats_as_mixtral
from mixchat.weights.make.quantize_options import DEMO_LOSS

if TYPE_CHECKING:
    from mixchat.planning.expectation import Expectation, SpeedRange, TokenCost
    from mixchat.planning.machine_speeds import Measurement
    from mixchat.planning.plan import KnownFit, MachinePlan
    from mixchat.planning.worker_split import WorkerSplit
    from mixchat.weights.make.outline import Outline


def sections(outline: Outline, plan: MachinePlan) -> Iterator[str]:
    """Yield the sections of a plan after its verdict."""
    yield section("the machine" if plan.told.is_another else "this machine", _machine(plan))
    yield section(f"the model: {outline.name}", _model(outline, plan))
    yield section("what goes where", _places(plan))
    yield section("what to expect", _expected(plan))
    if plan.in_3_bits or plan.mixes:
        yield section("with experts in fewer bits", _frontier(plan))
    if plan.spread:
        yield section("with workers", _spread(plan, plan.spread))
    yield section("what more memory would give", _more(plan))


def section(title: str, content: str | Iterable[tuple[str, str]]) -> str:
    """Return a title and indented lines, from a text or from rows of cells."""
    text = content if isinstance(content, str) else aligned(list(content))
    indented = "\n".join(f"  {line}" for line in text.splitlines())
    return f"{title[0].upper()}{title[1:]}\n{indented}"


def _machine(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    there, told = plan.machine, plan.told
    not_told = ", this machine's" if told.is_another else ""
    yield "CPU", f"{there.cpu}, {count_text(there.cores, 'core')}{not_told}"
    limit = f" (limit: {there.free.limit})" if there.free.limit else ""
    yield "RAM", f"{_memory(there.memory, there.free.host, told.ram is not None)}{limit}"
    if there.gpu_memory is not None and there.free.device is not None:
        is_told = bool(told.gpus)
        yield "GPU", f"{there.gpu}, {_memory(there.gpu_memory, there.free.device, is_told)}"
        for other in there.other_gpus:
            free = there.free.others[other.device]
            yield other.device, f"{other.name}, {_memory(other.memory, free, is_told)}"
    elif plan.device.type == "cpu":
        yield "GPU", "not used"
    yield "disk", _disk(plan)
    yield from _speeds(plan)
    yield from _measured(plan.measurement)


def _memory(size: int, free: int, is_told: bool) -> str:
    if is_told:
        return f"{format_size(size)} (told), {format_size(free)} free (assumed)"
    return f"{format_size(size)}, {format_size(free)} free"


def _disk(plan: MachinePlan) -> str:
    speeds, told = plan.measurement.typical, plan.told
    free = f"{format_size(plan.machine.disk_free)} free{' (told)' if told.free_disk else ''}"
    if told.disk_speed is not None:
        return f"{free}, reads {_rate(told.disk_speed)} (told; tokens get {IN_USE:.0%} of it)"
    if speeds.disk_bandwidth is None or speeds.disk_bandwidth_idle is None:
        return f"{free}, not measured: it cannot be written to, or has no room; see --disk-speed"
    read = f"reads {_rate(speeds.disk_bandwidth_idle)} (tokens get {IN_USE:.0%} of it)"
    read += f", {_rate(speeds.disk_bandwidth)} while the CPU computes"
    if speeds.disk_bandwidth_fresh is not None:
        read += f", {_rate(speeds.disk_bandwidth_fresh)} in a cold start"
    return f"{free}, {read}"


def _speeds(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    speeds = plan.measurement.typical
    for device in speeds.expert_seconds:
        name = "the CPU" if device == "cpu" else "the GPU"
        pace = f", reading {_rate(speeds.memory_bandwidth)} of weights" if device == "cpu" else ""
        yield "expert", f"takes {_time(speeds.expert_time(device, 1))} for a token on {name}{pace}"
    if speeds.copy_bandwidth is not None:
        yield "copies", f"{_rate(speeds.copy_bandwidth)} from RAM to the GPU"
    if plan.gpu_is_assumed:
        yield "assumed", "the speeds of the GPU, because this machine has none to measure:"
        memory, compute = _rate(GPU_MEMORY), f"{GPU_COMPUTE / 1e12:.0f} TFLOP/s"
        yield "", f"{memory} from its memory, {_rate(GPU_BUS)} from RAM, {compute}"


def _measured(made: Measurement) -> Iterator[tuple[str, str]]:
    when = datetime.fromtimestamp(made.measured_at).strftime("%Y-%m-%d %H:%M")
    age, count = format_age(time.time() - made.measured_at), len(made.samples)
    yield "measured", f"{when} ({age}), {count_text(count, 'sample')}; --measure measures again"
    yield "", f"on {made.cpu}, and the disk of {made.directory}"
    if made.busy:
        yield "", "measured on a busy machine: better figures come when it is idle"


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
    wide = ", in 16 bits" if plan.fit.computed != plan.fit.blueprint else ""
    yield "shared", f"{format_size(demand.shared)}: the weights that every token needs{wide}"
    parallel = plan.fit.options.parallel
    each = f" for each of {parallel} answers at once" if parallel > 1 else ""
    size, tokens = format_size(demand.context), count_text(plan.fit.context, "token")
    yield "context", f"{size} for {tokens}{each}"
    when = "installed" if outline.installed else "once it is downloaded"
    yield "disk", f"{format_size(outline.blueprint.size)}, {when}"


def _places(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    demand, placement, free = plan.fit.demand, plan.fit.placement, plan.machine.free
    slots = f"{placement.slots} of {count_text(placement.experts, 'expert')}, the shared weights"
    if free.device is None:
        left = free.host - demand.shared - demand.taken(placement.slots)
        yield "RAM", f"{slots}; {format_size(left)} left free"
        if left < demand.context + placement.reserve:
            yield "", "as the context fills, fewer experts fit"
    else:
        left = free.device - demand.shared - demand.context - demand.taken(placement.slots)
        yield "GPU", f"{slots}, the context; {format_size(left)} left free"
        for (name, size), count in zip(free.others.items(), placement.other_slots, strict=True):
            left = size - count * demand.expert
            held = count_text(count, "expert") if count else "not used, for two experts do not fit"
            yield name, f"{held}; {format_size(left)} left free"
        host = placement.host_slots
        left = free.host - host * demand.expert
        behind = count_text(host, "expert") if host else "no experts"
        fit = sum(placement.by_device) + host
        if plan.expected.held < min(fit, placement.experts):
            behind += f", those on {gpus_text(plan)} among them"
        yield "RAM", f"{behind}; {format_size(left)} left free"
    yield "disk", _rest(placement.experts - plan.expected.held)


def _rest(experts: int) -> str:
    if not experts:
        return "nothing that is read more than once"
    return f"the other {count_text(experts, 'expert')}, read when a token needs them"


def _expected(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    expected = plan.expected
    yield from _decode(expected)
    hits = f"{expected.hit_rate:.0%} of the experts that tokens use"
    if plan.machine.free.device is None:
        yield "cache hits", f"{hits} are in RAM"
    else:
        held = f"{hits} are on {gpus_text(plan)}"
        yield "cache hits", f"{held}, {expected.host_hit_rate:.0%} there or in RAM"
    config = plan.fit.computed.config
    if expected.hit_rate < 1 and not repeats_as_mixtral(config):
        shape = f"{config.num_experts_per_tok} of {config.num_local_experts}"
        yield "", f"assuming that all are chosen alike: no figures are published for {shape}"
    if plan.prompt is not None:
        rates = format_rates(plan.prompt.low, plan.prompt.high)
        seconds = format_times(LONG_PROMPT / plan.prompt.high, LONG_PROMPT / plan.prompt.low)
        yield "prompt", f"{rates} tok/s: {LONG_PROMPT} tokens are read in {seconds}"
    if plan.first_token is not None:
        first = plan.first_token
        prompt = f"for a prompt of {PROMPT} tokens, all weights still on disk:"
        yield "first token", f"after {format_times(first.low, first.high)} {prompt}"
        yield "", f"{_time(first.starting)} reading the shared weights"
        yield from (("", reason) for reason in _reasons(first.prompt))
    fewer = ", with fewer experts in memory" if plan.fit.largest_context > plan.fit.context else ""
    yield "context", f"up to {plan.fit.largest_context} tokens fit{fewer}"


def _decode(expected: Expectation) -> Iterator[tuple[str, str]]:
    if expected.cost is None:
        yield "decode", speed_text(None)
        return
    yield "decode", f"{_pace(expected)}: a token takes {_time(expected.cost.seconds)}"
    yield from (("", reason) for reason in _reasons(expected.cost))
    if expected.answers > 1:
        yield "together", f"{speed_text(expected.together)} of {expected.answers} answers at once"


def _frontier(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    """Yield a row for each size, and how much the demo loses there."""
    now = Variant("4", DEMO_LOSS["nf4"], plan.fit, plan.expected)
    smaller = [form for form in (plan.in_3_bits, *plan.mixes) if form is not None]
    smaller.sort(key=lambda form: -form.fit.blueprint.size)
    for form in (now, *smaller):
        fit, expected = form.fit, form.expected
        size = format_size(fit.blueprint.size)
        held = f"{expected.held} of {count_text(fit.placement.experts, 'expert')} in memory"
        about = "about " if form in plan.mixes else ""
        yield f"{form.bits} bits", f"{size} of disk, {held}, {about}{speed_text(expected.speed)}"
        plain, calibrated = form.loss
        demo = f"{calibrated:.0%}; a download calibrates it"
        if plain is not None:
            demo = f"{plain:.0%}, {calibrated:.0%} if calibrated (--calibrate)"
        yield "", f"the demo model's perplexity rises by {demo}"
    yield "", "a larger model's rises less; --expert-bits 3 plans or downloads it in 3 bits"


def _spread(plan: MachinePlan, spread: WorkerSplit) -> Iterator[tuple[str, str]]:
    for offer, held in zip(spread.offers, spread.held, strict=True):
        yield offer.address, f"holds {count_text(held, 'expert')}, with room for {offer.slots}"
        each = f"{_time(offer.expert_seconds)} for an expert and a token"
        yield "", f"takes {each}, and {_time(offer.round_trip)} for the way there and back"
    beside = f", {spread.copies} of them beside a worker" if spread.copies else ""
    yield "this machine", f"holds {count_text(spread.here, 'expert')}{beside}"
    yield "disk", _rest(plan.fit.placement.experts - spread.expected.held)
    yield from _decode(spread.expected)


def _reasons(cost: TokenCost) -> Iterator[str]:
    yield f"{_time(cost.computing)} computing"
    if cost.waiting:
        yield f"{_time(cost.waiting)} waiting for workers, beyond what is computed here meanwhile"
    if cost.copied:
        yield f"{_time(cost.copying)} copying {_number(cost.copied)} experts from RAM to the GPU"
    if cost.read:
        yield f"{_time(cost.reading)} reading {_number(cost.read)} experts from disk"
    if cost.hidden:
        yield f"{_time(cost.hidden)} less, because some of this runs at the same time"


def _number(count: float) -> str:
    return f"{count:.3g}" if count < 999.5 else f"{count:.0f}"


def _more(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    if plan.expected.cost is None:
        yield "unknown", "because the disk could not be measured"
    elif not plan.more:
        yield "nothing", "all experts are in the fastest memory already"
    for more in plan.more:
        first = "the first GPU" if plan.machine.free.others else "the GPU"
        what = "RAM" if more.tier == "host" else f"on {first}"
        yield f"+{format_size(more.bytes)} {what}", _pace(more.expected)


def known_models(name: str, plan: MachinePlan) -> str:
    """Return the table of the known models, which were compared with the planned one."""
    rows = [("model", "disk", "tok/s", "experts")]
    for model in plan.known:
        rows.append((", ".join(model.names), format_size(model.bytes), *_known(model, plan)))
    return (
        f"{aligned(rows)}\n"
        f"The speeds follow from the figures of {name} by arithmetic, unless a model\n"
        "was measured before. 'mixchat plan NAME' measures it, and says more."
    )


def _known(model: KnownFit, plan: MachinePlan) -> tuple[str, str]:
    if model.fit is None or model.expected is None:
        return "-", model.problem or ""
    speed, placement = model.expected.speed, model.fit.placement
    pace = "unknown" if speed is None else format_rates(speed.low, speed.high)
    held, everything = model.expected.held, placement.experts
    on_gpu = 0 if plan.machine.free.device is None else sum(placement.by_device)
    places = {
        f"on {gpus_text(plan)}": on_gpu,
        "in RAM": held - on_gpu,
        "on disk": everything - held,
    }
    shares = (f"{count / everything:.0%} {place}" for place, count in places.items() if count)
    return pace, ", ".join(shares)


def _pace(expected: Expectation) -> str:
    each = " for each answer" if expected.answers > 1 else ""
    return f"{speed_text(expected.speed)}{each}"


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


def gpus_text(plan: MachinePlan) -> str:
    """Return what a sentence calls the GPUs."""
    return "the GPUs" if plan.machine.free.others else "the GPU"


def count_text(count: int, unit: str) -> str:
    """Return `1 layer` or `2 layers`."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
