"""Kills downloads with SIGKILL at random moments, and resumes them until they are whole."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rig
from counted_hub import Hub

CHUNK = 1_000_000
PACE = 0.004  # seconds for each 64 KiB, where fetching should be slower than quantizing


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
    source, blobs = work / rig.WORKSPACE / "source", work / "hf/hub"
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
        },
    )


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, rounds=200, seed=0, gguf=0)
    chance, found, began = random.Random(options.seed), Found(), time.monotonic()
    with rig.workplace() as work:
        rig.warm_up()
        with Hub(rig.make_source(work / "source", options.seed, gguf=options.gguf)) as hub:
            reference, seconds = _uninterrupted(work, hub)
            while found.kills < options.rounds:
                _model(work, hub, chance, found, reference, seconds, options.rounds)
    report(found, time.monotonic() - began)
    if max(found.again + found.again_rate + found.off_disk, default=0) > CHUNK:
        found.failures.append(f"a kill cost more than {CHUNK:,} bytes")
    return rig.told(found.failures)


def _uninterrupted(work: Path, hub: Hub) -> tuple[dict[str, str], float]:
    """A download left in peace, and how long it took at the slow pace."""
    hub.set(delay=PACE)
    began = time.monotonic()
    code = rig.wait(rig.fork(rig.mixchat("download", rig.REPO), work / "out"))
    assert code == 0, (work / "out").read_text()
    reference = rig.digests(work / "home/models" / rig.KEY)
    seconds = time.monotonic() - began
    _remove(work)
    hub.log()
    return reference, seconds


def _model(
    work: Path,
    hub: Hub,
    chance: random.Random,
    found: Found,
    reference: dict[str, str],
    seconds: float,
    rounds: int,
) -> None:
    """One model, killed until it is whole."""
    keep = ["--keep-source"] if found.models % 4 == 3 else []
    hub.set(delay=(0, PACE)[found.models % 2])
    kills, parts = 0, {}
    while True:
        hub.set(session=kills)
        real = chance.random() < 0.1
        last = found.kills >= rounds
        # Longer and longer, so that each model is killed a few times and then is whole.
        when = None if last else chance.random() * (0.7 + 0.08 * kills)
        code = _round(work, keep, real, when, seconds)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            found.failures.append(f"kill {found.kills}: exit {code}: {(work / 'out').read_text()}")
            _remove(work)
            return
        found.at[_where(work)] += 1
        kills, found.kills = kills + 1, found.kills + 1
        parts[kills] = shards_on_disk(work)
    time.sleep(0.05)  # for the hub to notice the last kill
    count(hub.log(), parts, kills, found)
    found.models += 1
    _compare(work, reference, keep, found)
    _remove(work)


def _round(
    work: Path, keep: list[str], real: bool, when: float | None, seconds: float
) -> int | None:
    """One download, killed at `when` (0 to 1) of its time; its exit code."""
    arguments = ("download", rig.REPO, *keep)
    if not real:
        pid = rig.fork(rig.mixchat(*arguments), work / "out")
    else:
        with open(work / "out", "wb") as out:
            command = [str(Path(sys.executable).with_name("mixchat")), *arguments]
            pid = subprocess.Popen(command, stdout=out, stderr=out).pid
    if when is not None:
        end = time.monotonic() + when * (seconds + (2.5 if real else 0))
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return rig.wait(pid)


def _where(work: Path) -> str:
    """Return what the killed one was at."""
    place = work / rig.WORKSPACE
    if not (place / "journal.jsonl").exists():
        return "before the first file, or after the last"
    made = len((place / "journal.jsonl").read_bytes().splitlines()) > 1
    spilled = any(place.glob("spill-*"))
    return "fetching, nothing made" if not made else "making" + (", tensors spilled" * spilled)


def _compare(work: Path, reference: dict[str, str], keep: list[str], found: Found) -> None:
    code = rig.wait(rig.fork(rig.mixchat("gc"), work / "out"))
    made = rig.digests(work / "home/models" / rig.KEY)
    if code or made != reference:
        wrong = sorted(set(made.items()) ^ set(reference.items()))[:3]
        found.failures.append(f"model {found.models}: gc {code}, other files: {wrong}")
    beside = [path for path in (work / "home").rglob("*") if path.is_file()]
    beside = [path for path in beside if path.parent.name != rig.KEY]
    cache = [path for path in (work / "hf").rglob("*") if path.is_file()]
    if keep:
        cache = [path for path in cache if path.name.endswith((".incomplete", ".part"))]
    shards = list((work / "hf").rglob("snapshots/*/*-of-*"))
    if beside or cache or bool(shards) != bool(keep):
        found.failures.append(f"model {found.models}: left {beside + cache + shards}")


def _remove(work: Path) -> None:
    shutil.rmtree(work / "home", ignore_errors=True)
    shutil.rmtree(work / "hf/hub", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
