"""Lets eight processes download the same model at once, some rounds with the first one killed."""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import rig
from counted_hub import Hub

CHUNK = 1_000_000
WAITING = "waiting for it"


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, rounds=10, processes=8, seed=0)
    chance, failures = random.Random(options.seed), []
    began = time.monotonic()
    print("round  first  exits ok  said to wait  shard bytes sent  twice  corrupt  s")
    with rig.workplace() as work:
        rig.warm_up()
        source = rig.make_checkpoint(work / "source", options.seed, **rig.SMALL)
        with Hub(source, delay=0.002) as hub:
            reference = _reference(work)
            for number in range(options.rounds):
                hub.log()
                killed = number % 3 == 2
                failures += _round(work, hub, source, chance, killed, number, options, reference)
    print(f"{options.rounds} rounds, {time.monotonic() - began:.0f} s")
    return rig.told(failures)


def _reference(work: Path) -> dict[str, str]:
    code = rig.wait(rig.fork(rig.mixchat("download", rig.REPO), work / "out"))
    assert code == 0, (work / "out").read_text()
    reference = rig.digests(work / "home/models" / rig.KEY)
    shutil.rmtree(work / "home")
    return reference


def _round(
    work: Path,
    hub: Hub,
    source: Path,
    chance: random.Random,
    killed: bool,
    number: int,
    options: argparse.Namespace,
    reference: dict[str, str],
) -> list[str]:
    """One round; what went wrong."""
    keep = ["--keep-source"] if number % 4 == 3 else []
    began = time.monotonic()
    outputs = [work / f"out{n}" for n in range(options.processes)]
    download = rig.mixchat("download", rig.REPO, *keep)
    pids = [rig.fork(download, output) for output in outputs]
    codes: dict[int, int | None] = {}
    if killed:
        first = _first(outputs)
        time.sleep(chance.uniform(0.1, 1.5))
        os.kill(pids[first], signal.SIGKILL)
        codes[first] = rig.wait(pids[first])
    for n, pid in enumerate(pids):
        if n not in codes:
            codes[n] = rig.wait(pid)
    waited = sum(WAITING in output.read_text() for output in outputs)
    sent, twice = _sent(hub.log())
    whole = sum(path.stat().st_size for path in source.glob("*-of-*"))
    right = rig.digests(work / "home/models" / rig.KEY) == reference
    good = sum(code == 0 for code in codes.values())
    seconds = time.monotonic() - began
    print(
        f"{number:5}  {'killed' if killed else 'lives':6} {good:8}  {waited:12}  {sent:16,}"
        f"  {twice:5,}  {'no' if right else 'YES':7}  {seconds:.1f}"
    )
    failures = []
    if good != options.processes - killed or (killed and codes[first] != -signal.SIGKILL):
        failures.append(f"round {number}: exit codes {codes}")
    if waited != options.processes - 1:
        failures.append(f"round {number}: {waited} said that they wait")
    if not right or sent - twice != whole or twice > CHUNK * killed:
        failures.append(f"round {number}: {sent:,} of {whole:,} sent, {twice:,} twice")
    if left := [path.name for path in (work / "home/models").iterdir() if path.name != rig.KEY]:
        failures.append(f"round {number}: left {left}")
    shutil.rmtree(work / "home")
    return failures


def _first(outputs: list[Path]) -> int:
    """Return which process makes the model: the one that does not say that it waits."""
    while True:
        working = [n for n, output in enumerate(outputs) if WAITING not in _text(output)]
        if len(working) == 1:
            return working[0]
        time.sleep(0.01)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _sent(log: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the bytes of shards that were sent, and how many of them were sent again."""
    shards = [e for e in log if e["where"] == "store" and "-of-" in e["name"] and e["last"] == ""]
    reached: dict[str, int] = {}
    twice = 0
    for entry in shards:
        twice += max(0, reached.get(entry["name"], 0) - entry["first"])
        reached[entry["name"]] = entry["first"] + entry["sent"]
    return sum(entry["sent"] for entry in shards), twice


if __name__ == "__main__":
    sys.exit(main())
