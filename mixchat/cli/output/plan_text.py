"""A plan for a machine, as text for a person and as JSON for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mixchat.cli.output import download_text
from mixchat.cli.output.table import aligned
from mixchat.planning.expectation import PROMPT
from mixchat.quantities import format_age, format_least, format_rates, format_size, format_time
from mixchat.weights.make.download_plan import weights_size

if TYPE_CHECKING:
    from mixchat.planning.cost import TokenCost
    from mixchat.planning.expectation import SpeedRange
    from mixchat.planning.plan import MachinePlan
    from mixchat.weights.make.outline import Outline

Rows = Sequence[tuple[str, str]]


def as_text(found: Outline, plan: MachinePlan) -> str:
    """All of a plan, in sections."""
    sections: list[tuple[str, Rows]] = [
        ("verdict", list(_verdict(found, plan))),
        ("this machine", list(_machine(plan))),
        (f"the model: {found.name}", list(_model(found, plan))),
        ("what goes where", list(_places(plan))),
        ("what to expect", list(_expected(plan))),
        ("what more memory would give", list(_more(plan))),
    ]
    texts = [_section(title, aligned(rows)) for title, rows in sections]
    if not found.kept:
        texts.append(_section("to download it", _download(found)))
    return "\n\n".join(texts)


def as_dict(found: Outline, plan: MachinePlan) -> dict[str, Any]:
    """The same as JSON has it: bytes, seconds, tokens per second."""
    made = asdict(plan)
    for name, cost in (("cost", plan.cost), ("first_token", plan.first_token)):
        if cost is not None:
            made[name]["seconds"] = cost.seconds
    if plan.cost is not None:
        made["cost"]["hidden"] = plan.cost.hidden
    return {
        "model": found.name,
        "path": str(found.directory),
        "kept": found.kept,
        "kept_bytes": weights_size(found.blueprint),
        "quantization": found.blueprint.quantization.description(),
        "fits": not found.lacking,
        "disk": download_text.disk_as_dicts(found.disk),
        "tokens_per_second": plan.tokens_per_second,
        **made,
        "download": None if found.download is None else download_text.as_dict(found.download),
    }


def _section(title: str, text: str) -> str:
    indented = "\n".join(f"  {line}" for line in text.splitlines())
    return f"{title[0].upper()}{title[1:]}\n{indented}"


def _verdict(found: Outline, plan: MachinePlan) -> Iterator[tuple[str, str]]:
    speed = _speed(plan.speed)
    if found.kept:
        yield "it runs here", speed
    elif not found.lacking:
        yield "it fits", f"once it is downloaded: {speed}"
    else:
        for need in found.lacking:
            missing = format_least(need.needed - need.free)
            yield (
                "it does not fit",
                f"{missing} of disk are missing: the download takes up to "
                f"{format_least(need.needed)} in {need.place}, {format_size(need.free)} are free",
            )
        yield "", "free some space, or set MIXCHAT_HOME to a directory on a larger disk"
        yield "if it did", speed


def _machine(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    there, speeds = plan.machine, plan.speeds
    yield "CPU", f"{there.cpu}, {there.cores} {'core' if there.cores == 1 else 'cores'}"
    limit = f" (limit: {there.free.limit})" if there.free.limit else ""
    yield "RAM", f"{format_size(there.memory)}, {format_size(there.free.host)} free{limit}"
    if there.gpu_memory is not None and there.free.device is not None:
        free = format_size(there.free.device)
        yield "GPU", f"{there.gpu}, {format_size(there.gpu_memory)}, {free} free"
    elif plan.device == "cpu":
        yield "GPU", "none in use"
    read = "not measured: it cannot be written to, or has no room"
    if speeds.disk_bandwidth is not None and speeds.disk_bandwidth_idle is not None:
        read = f"reads {_rate(speeds.disk_bandwidth_idle)}"
        read += f", {_rate(speeds.disk_bandwidth)} while the CPU computes"
    yield "disk", f"{format_size(there.disk_free)} free, {read}"
    for device in speeds.expert_seconds:
        where = "the CPU" if device == "cpu" else "the GPU"
        pace = f", {_rate(speeds.memory_bandwidth)}" if device == "cpu" else ""
        yield "expert", f"{_time(speeds.expert_time(device, 1))} for a token on {where}{pace}"
    if speeds.copy_bandwidth is not None:
        yield "copies", f"{_rate(speeds.copy_bandwidth)} from RAM to the GPU"
    when = datetime.fromtimestamp(plan.measured_at).strftime("%Y-%m-%d %H:%M")
    age = format_age(time.time() - plan.measured_at)
    yield "measured", f"{when} ({age}), {plan.samples} samples; --measure measures again"


def _model(found: Outline, plan: MachinePlan) -> Iterator[tuple[str, str]]:
    config, demand = found.blueprint.config, plan.fit.demand
    of_a_layer = f"{config.num_experts_per_tok} of {config.num_local_experts} a token"
    each = f"{demand.experts} of {format_size(demand.expert)} each"
    yield (
        "experts",
        f"{format_size(demand.experts * demand.expert)}: {each}, {of_a_layer} in each of "
        f"{config.num_hidden_layers} layers",
    )
    yield "shared", f"{format_size(demand.shared)} that every token needs"
    yield "context", f"{format_size(demand.context)} for {plan.fit.context} tokens"
    when = "here already" if found.kept else "once it is downloaded"
    yield "disk", f"{format_size(weights_size(found.blueprint))}, {when}"


def _places(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    demand, placement, free = plan.fit.demand, plan.fit.placement, plan.machine.free
    slots = f"{placement.slots} experts of {placement.experts}, all that is shared"
    if free.device is None:
        left = free.host - demand.shared - placement.slots * demand.expert
        yield "RAM", f"{slots}; {format_size(left)} left free"
        if left < demand.context + placement.reserve:
            yield "", "a context that fills takes room from the experts"
    else:
        left = free.device - demand.shared - demand.context - placement.slots * demand.expert
        yield "GPU", f"{slots}, the context; {format_size(left)} left free"
        left = free.host - placement.host_slots * demand.expert
        behind = f"{placement.host_slots} experts" if placement.host_slots else "no experts"
        if plan.held < min(placement.slots + placement.host_slots, placement.experts):
            behind += ", those on the GPU among them"
        yield "RAM", f"{behind}; {format_size(left)} left free"
    others = placement.experts - plan.held
    kept = f"the other {others} experts, read when they are asked for"
    yield "disk", kept if others else "nothing that is read more than once"


def _expected(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    if plan.cost is None:
        yield "speed", _speed(None)
    else:
        yield "speed", f"{_speed(plan.speed)}: a token takes {_time(plan.cost.seconds)}"
        yield from (("", reason) for reason in _reasons(plan.cost))
    held = f"{plan.hit_rate:.0%} of the experts that tokens ask for"
    if plan.machine.free.device is None:
        yield "at hand", f"{held} are in RAM"
    else:
        yield "at hand", f"{held} are on the GPU, {plan.host_hit_rate:.0%} there or in RAM"
    if plan.first_token is not None:
        first = plan.first_token
        yield "at first", f"{_time(first.seconds)} to answer {PROMPT} tokens, all still on disk:"
        yield "", f"{_time(first.starting)} reading what is shared"
        yield from (("", reason) for reason in _reasons(first.prompt))
    fewer = ", with fewer experts at hand" if plan.fit.largest_context > plan.fit.context else ""
    yield "context", f"up to {plan.fit.largest_context} tokens fit{fewer}"


def _reasons(cost: TokenCost) -> Iterator[str]:
    yield f"{_time(cost.computing)} computing"
    if cost.copied:
        yield f"{_time(cost.copying)} copying {cost.copied:.3g} experts from RAM to the GPU"
    if cost.read:
        yield f"{_time(cost.reading)} reading {cost.read:.3g} experts from disk"
    if cost.hidden:
        yield f"{_time(cost.hidden)} less, because some of this goes on at the same time"


def _more(plan: MachinePlan) -> Iterator[tuple[str, str]]:
    if plan.cost is None:
        yield "unknown", "because the disk could not be measured"
    elif not plan.what_more_buys:
        yield "nothing", "all experts are in the fastest memory there is"
    for more in plan.what_more_buys:
        what = "RAM" if more.tier == "host" else "on the GPU"
        yield f"+{format_size(more.bytes)} {what}", _speed(more.speed)


def _download(found: Outline) -> str:
    if found.download is not None:
        return download_text.as_text(found.download)
    return f"'mixchat download {found.name} --dry-run' asks the hub what it takes."


def _speed(speed: SpeedRange | None) -> str:
    if speed is None:
        return "unknown, because the disk could not be measured"
    return f"{format_rates(speed.low, speed.high)} tokens/s"


def _rate(bytes_per_second: float) -> str:
    return f"{format_size(int(bytes_per_second))}/s"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else format_time(seconds)
