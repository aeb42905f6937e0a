"""The plan of a download, as text for a person and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixchat.base.quantities import format_least, format_size, format_time
from mixchat.cli.output.table import aligned

if TYPE_CHECKING:
    from mixchat.weights.make.download_plan import DownloadPlan, Need


def download_as_text(plan: DownloadPlan) -> str:
    """Return a plan as lines of text."""
    commit = f" at {plan.commit[:12]}" if plan.commit else ""
    fetch = format_size(plan.fetch)
    if plan.fetch < plan.checkpoint:
        fetch += (
            f" of {format_size(plan.checkpoint)}; the rest is here already" if plan.commit else ""
        )
    rows = [
        ("from", plan.source + commit),
        ("fetch", fetch),
        ("install", f"{format_size(plan.installed)} in {plan.target}"),
        *(("disk", f"{_need(need)} in {need.place}") for need in plan.disk),
        ("memory", _need(plan.memory)),
    ]
    if plan.seconds is not None:
        rate = f", at {format_size(int(plan.rate))}/s as measured now" if plan.rate else ""
        rows.append(("time", f"about {format_time(plan.seconds)}{rate}"))
    if plan.rounded_from is not None:
        stored = "are stored as bf16, which rounds them to 8 bits of precision"
        rows.append(("note", f"{plan.rounded_from} weights {stored}"))
    return aligned(rows)


def download_as_dict(plan: DownloadPlan) -> dict[str, Any]:
    """Return a plan as JSON has it: sizes in bytes."""
    return {
        "name": plan.name,
        "path": str(plan.target),
        "source": plan.source,
        "commit": plan.commit,
        "quantization": dict(plan.quantization),
        "checkpoint_bytes": plan.checkpoint,
        "fetch_bytes": plan.fetch,
        "kept_bytes": plan.installed,
        "disk": disk_as_dicts(plan.disk),
        "memory": {"needed_bytes": plan.memory.needed, "free_bytes": plan.memory.free},
        "bytes_per_second": plan.rate,
        "seconds": plan.seconds,
        "rounded_from": plan.rounded_from,
    }


def disk_as_dicts(disk: Sequence[Need]) -> list[dict[str, Any]]:
    """Return the needs of each disk as JSON has them."""
    return [
        {"path": str(need.place), "needed_bytes": need.needed, "free_bytes": need.free}
        for need in disk
    ]


def _need(need: Need) -> str:
    return f"{format_least(need.needed)} at most, {format_size(need.free)} free"
