"""Downloads from a hub that lies, breaks off and refuses, onto a disk that flips bytes.

Each download ends whole, or with one line and exit code 5; the next one, without faults, is whole.
The good files in Hugging Face's cache stay there. Before that, each kind of lie about each file is
told for ever: that ends with 5, in little memory. A broken file that has its hash ends with 6.
"""

import hashlib
import random
import shutil
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import hostile
import rig
from counted_hub import Hub
from fake_hub import LIES

SMALL_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.model")
ANY = "safetensors|config.json|tokenizer.model"


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, rounds=100, seed=0, every=1)
    chance, failures, ends = random.Random(options.seed), [], Counter[str]()
    began = time.monotonic()
    with rig.workplace() as work:
        rig.warm_up()
        _lose_patience()
        with Hub(rig.make_checkpoint(work / "source", options.seed, **rig.SMALL)) as hub:
            assert _download(work, []) == 0, (work / "out").read_text()
            reference = rig.digests(_model(work))
            failures += _lies(work, hub, reference, options.every)
            for number in range(options.rounds):
                for problem in _round(work, hub, chance, reference, ends):
                    failures.append(f"round {number}: {problem}")
    seconds = time.monotonic() - began
    rig.table(f"hub faults: {options.rounds} rounds, {seconds:.0f} s", dict(sorted(ends.items())))
    return rig.told(failures)


def _lies(work: Path, hub: Hub, reference: dict[str, str], every: int) -> list[str]:
    """Tell each kind of lie about each file, with and without its length; return what failed.

    every: 1, or the step from one of these lies to the next one that is told.
    """
    found, counts = hostile.Found(), Counter[str]()
    files = (work / "source").iterdir()
    shards = sorted(path.name for path in files if path.suffix == ".safetensors")
    headers = (["Content-Length"], [])
    cases = [*product(headers, LIES, (*SMALL_FILES, *shards[:2]))]
    for omit, lie, name in cases[::every]:
        for place in ("home", "hf"):
            shutil.rmtree(work / place, ignore_errors=True)
        hub.set(faults=[{"path": f"/{name}$", "lie": lie}], omit=omit)
        label = f"{name}: {lie}{', without its length' if omit else ''}"
        code = hostile.judged(rig.mixchat("download", rig.REPO), work / "out", label, found)
        counts[f"exit code {code}"] += 1
        said = (work / "out").read_text()
        whole = code == 0 and rig.digests(_model(work)) == reference
        if code != 5 and not whole:  # whole: what came before the lie is the file
            found.failures.append(f"{label}: exit code {code}: {said[-200:]}")
    rows = {**dict(sorted(counts.items())), "most memory of a process": f"{found.memory:,}"}
    rig.table(f"lies: {sum(counts.values())}", rows)
    hub.set(faults=[], omit=[])
    return found.failures


def _lose_patience() -> None:
    """No child waits between two attempts."""
    from types import SimpleNamespace

    from huggingface_hub.utils import _http

    from mixchat.install.source import hub_request, transfer

    transfer._WAITS_S = (0.0,) * 5  # type: ignore[assignment]
    hub_request._WAIT_S_MAX = 0.05
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    _http.time = impatient  # type: ignore[assignment]


def _round(
    work: Path, hub: Hub, chance: random.Random, reference: dict[str, str], ends: Counter[str]
) -> list[str]:
    """Return what went wrong."""
    shutil.rmtree(work / "home", ignore_errors=True)
    keep = ["--keep-source"] if chance.random() < 0.3 else []
    if chance.random() < 0.3:
        shutil.rmtree(work / "hf", ignore_errors=True)
    problems = []
    for _ in range(chance.randrange(1, 4)):
        good = _good_blobs(work)
        omit = [name for name in ("Content-Length", "Content-Range") if chance.random() < 0.1]
        faults = [_fault(chance) for _ in range(chance.randrange(1, 5))]
        hub.set(faults=faults, omit=omit)
        code = _download(work, keep)
        ends[f"ended with exit code {code}"] += 1
        problems += _judge(work, code, reference, f"{faults} {omit}")
        problems += [f"{name} is gone from the cache" for name in good - _good_blobs(work)]
        if code == 0:
            break
        if _flip(work, chance):
            ends["bytes flipped in an unfinished model"] += 1
    hub.set(faults=[], omit=[])
    code = _download(work, keep)
    if code == 5:  # what was damaged on this disk may have to be removed first
        code = _download(work, keep)
    if code != 0 or rig.digests(_model(work)) != reference:
        problems.append(f"not whole at the end ({code}): {(work / 'out').read_text()[-300:]}")
    return problems


def _fault(chance: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"page": True},
        {"cut_after": chance.randrange(2_000_000)},
        {"earlier": chance.randrange(1, 100_000), "ranged": True},
        {"earlier": 500, "ranged": True, "cut_after": chance.randrange(200_000)},
        {"status": 416, "ranged": chance.random() < 0.7},
        {"status": chance.choice((408, 429, 500, 502, 503))},
        {"status": 503, "headers": {"Retry-After": chance.choice(("7", "soon", "-1", ""))}},
    ]
    times = 10**9 if chance.random() < 0.5 else chance.randrange(1, 9)
    # A later shard: what was made of those before it lies on the disk meanwhile.
    path = f"^/model-0000{chance.randrange(2, 7)}" if chance.random() < 0.8 else ANY
    after = chance.randrange(3)  # the first request is for the header
    return {"path": path, "times": times, "after": after, **chance.choice(kinds)}


def _judge(work: Path, code: int | None, reference: dict[str, str], faults: str) -> list[str]:
    said = (work / "out").read_text(errors="replace")
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    if code not in (0, 5) or len(lines) != (code == 5) or "Traceback" in said:
        return [f"exit code {code}, after {faults}: {said[-300:]}"]
    if code == 0 and rig.digests(_model(work)) != reference:
        return [f"another model, after {faults}"]
    return []


def _flip(work: Path, chance: random.Random) -> bool:
    """Change a byte of an unfinished model, sometimes; not of the journal, which has no hash."""
    files = [path for path in sorted((work / rig.WORKSPACE).rglob("*")) if path.is_file()]
    files = [path for path in files if path.stat().st_size and path.suffix != ".jsonl"]
    if not files or chance.random() < 0.2:
        return False
    path = chance.choice(files)
    with open(path, "r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ chance.randrange(1, 256)]))
    return True


def _good_blobs(work: Path) -> set[str]:
    """Those of the large files in the cache that are what their names say."""
    blobs = (work / "hf").glob("hub/models--*/blobs/*")
    return {
        path.name
        for path in blobs
        if len(path.name) == 64 and hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    }


def _download(work: Path, how: list[str]) -> int | None:
    return rig.wait(rig.fork(rig.mixchat("download", rig.REPO, *how), work / "out"))


def _model(work: Path) -> Path:
    return work / "home/models" / rig.KEY


if __name__ == "__main__":
    sys.exit(main())
