"""Kills downloads with SIGKILL at random moments, and resumes them until they are whole."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import rig
from counted_hub import Hub
from kill_count import CHUNK, Found, count, report, shards_on_disk

PACE = 0.004  # seconds for each 64 KiB, where fetching should be slower than quantizing


def main() -> int:
    """Run the campaign and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, found, began = random.Random(options.seed), Found(), time.monotonic()
    with rig.workplace() as work:
        rig.warm_up()
        hub = Hub(rig.make_checkpoint(work / "source", options.seed, **rig.SMALL))
        try:
            reference, seconds = _uninterrupted(work, hub)
            while found.kills < options.rounds:
                _model(work, hub, chance, found, reference, seconds, options.rounds)
        finally:
            hub.close()
    report(found, time.monotonic() - began)
    too_much = max(found.again + found.again_rate + found.off_disk, default=0) > CHUNK
    return 1 if found.failures or too_much else 0


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
    target = work / "home/models" / rig.KEY
    if not (target / "journal.jsonl").exists():
        return "before the first file, or after the last"
    made = len((target / "journal.jsonl").read_bytes().splitlines()) > 1
    spilled = any(target.glob("aside-*"))
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
