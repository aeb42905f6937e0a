"""The cost of killed downloads: bytes that the hub sent twice, and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rig

CHUNK = 1_000_000


@dataclass
class Found:
    """The counts of a campaign."""

    kills: int = 0
    models: int = 0
    at: Counter[str] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)  # bytes sent twice, for each kill
    off_disk: list[int] = field(default_factory=list)  # bytes that were on disk, yet came again
    again_rate: list[int] = field(default_factory=list)  # those with nothing on disk
    cut: int = 0
    headers: int = 0
    sent: int = 0
    failures: list[str] = field(default_factory=list)


def shards_on_disk(work: Path) -> dict[str, int]:
    """Return the bytes of each shard on disk, by its name in the model's directory."""
    shards = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in (work / "source").glob("*-of-*")
    }
    source, blobs = work / "home/models" / rig.KEY / "source", work / "hf/hub"
    sizes = {}
    for path in (*source.glob("*-of-*"), *blobs.glob("models--*/blobs/*")):
        name = path.name.removesuffix(".mixchat.part")
        sizes[shards.get(name, name)] = path.stat().st_size
    return sizes


def count(
    log: list[dict[str, Any]], parts: dict[int, dict[str, int]], kills: int, found: Found
) -> None:
    """Count the bytes of each shard that were sent twice, and why."""
    found.sent += sum(entry["sent"] for entry in log)
    store = [entry for entry in log if entry["where"] == "store" and "-of-" in entry["name"]]
    found.headers += sum(entry["sent"] for entry in store if entry["last"] != "")
    again, again_rate = Counter[int](), Counter[int]()
    last: dict[str, dict[str, Any]] = {}
    for entry in store:
        if entry["last"] != "":
            continue
        name, session = entry["name"], entry["session"]
        if before := last.get(name):
            twice = max(0, before["first"] + before["sent"] - entry["first"])
            had = parts.get(before["session"] + 1, {}).get(name, 0)
            if before["session"] == session:  # cut off when the rate was known
                found.cut += twice
            elif had <= before["first"]:  # killed before anything of it was on disk
                again_rate[before["session"]] += twice
            else:
                again[before["session"]] += twice
                found.off_disk.append(max(0, had - entry["first"]))
        last[name] = entry
    found.again += [again[number] for number in range(kills)]
    found.again_rate += [again_rate[number] for number in range(kills) if again_rate[number]]


def report(found: Found, seconds: float) -> None:
    """Print the table."""
    again, unsaved = found.again or [0], found.again_rate or [0]
    rig.table(
        f"kill: {found.kills} kills, {found.models} models, {seconds:.0f} s",
        {
            **{f"killed {place}": count for place, count in found.at.most_common()},
            "bytes sent": f"{found.sent:,}",
            "  headers, at each start": f"{found.headers:,}",
            "  sent and not read, when the rate was known": f"{found.cut:,}",
            "sent twice for a kill: mean": f"{sum(again) // len(again):,}",
            "sent twice for a kill: most": f"{max(again):,}",
            f"  kills that cost more than {CHUNK:,}": sum(number > CHUNK for number in again),
            "killed before a byte was on disk (rate, first bytes)": len(found.again_rate),
            "  sent twice for such a kill: most": f"{max(unsaved):,}",
            "bytes on disk that came again: most": max(found.off_disk or [0]),
            "failures": len(found.failures),
        },
    )
    for failure in found.failures[:20]:
        print("FAILED", failure)
