"""Flips single bytes of an installed model: each is found, named and repaired."""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import rig
from counted_hub import Hub

COMMANDS = ("verify", "repair", "verify")
FORCED = ("mixchat.json", "mixchat.copy.json", "config.json", "tokenizer.model")


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, flips=500, real=10, seed=0)  # real: by the real commands
    chance, failures, began = random.Random(options.seed), [], time.monotonic()
    kinds: Counter[str] = Counter()
    fetched: dict[str, list[int]] = defaultdict(list)
    with rig.workplace() as work:
        rig.warm_up()
        source = rig.make_checkpoint(work / "source", options.seed, **rig.SMALL)
        with Hub(source) as hub:
            for name in (rig.REPO, str(source)):
                code = rig.wait(rig.fork(rig.mixchat("download", name), work / "out"))
                assert code == 0, (work / "out").read_text()
            models = [work / "home/models" / rig.KEY, work / "home/models/source"]
            whole = [rig.digests(model) for model in models]
            hub.log()
            for number in range(options.flips):
                which = number % 2
                model = models[which]
                file, place = _choose(model, chance, number)
                kind, expected = _expected(model, file, place)
                _flip(model / file, place, chance.randrange(1, 256))
                real = number * options.real // options.flips
                real = real != (number + 1) * options.real // options.flips
                problem = (_by_command if real else _by_call)(model, expected)
                kinds[f"{kind}, from {('the hub', 'a directory')[which]}"] += 1
                sent = sum(entry["sent"] for entry in hub.log() if entry["where"] == "store")
                fetched[kind if which == 0 else "from a directory"].append(sent)
                if rig.digests(model) != whole[which]:
                    problem = f"{problem or ''} not the same bytes after repair"
                    shutil.rmtree(model)
                    again = rig.REPO if which == 0 else str(source)
                    rig.wait(rig.fork(rig.mixchat("download", again), work / "out"))
                    hub.log()
                if problem:
                    failures.append(f"flip {number}, {file} byte {place} ({expected}): {problem}")
    rig.table(
        f"flips: {options.flips}, {options.real} by the commands, {time.monotonic() - began:.0f} s",
        {
            **{f"flipped in {kind}": count for kind, count in sorted(kinds.items())},
            "found, named and repaired": options.flips - len(failures),
            **{
                f"bytes fetched to repair {kind}: mean, most": f"{sum(n) // len(n):,}, {max(n):,}"
                for kind, n in sorted(fetched.items())
            },
        },
    )
    return rig.told(failures)


def _choose(model: Path, chance: random.Random, number: int) -> tuple[str, int]:
    """Return a file and a byte of it, weighted by size; every kind is among the first sixty."""
    sizes = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    if number < 60:
        forced = (*FORCED, "shared.safetensors", "experts-001.safetensors")[number // 2 % 6]
        end = sizes[forced]
        if forced.endswith(".safetensors"):
            end = 8 + int.from_bytes((model / forced).read_bytes()[:8], "little")
            end = 8 if number % 20 < 10 else end
        return forced, chance.randrange(end)
    place = chance.randrange(sum(sizes.values()))
    for name, size in sizes.items():
        if place < size:
            return name, place
        place -= size
    raise AssertionError


def _expected(model: Path, file: str, place: int) -> tuple[str, str]:
    """Return the kind of the place, and the name that verify should give it."""
    if not file.endswith(".safetensors"):
        return ("the manifest or its copy" if "mixchat" in file else "a small file"), file
    data = (model / file).read_bytes()
    base = 8 + int.from_bytes(data[:8], "little")
    if place < base:
        return "a header", f"{file}: its header"
    for name, entry in json.loads(data[8:base]).items():
        if name != "__metadata__" and place < base + entry["data_offsets"][1]:
            start = base + entry["data_offsets"][0]
            if place >= start:
                return "a tensor", f"{file}: {name}"
    raise AssertionError


def _flip(path: Path, place: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ mask]))


def _by_call(model: Path, expected: str) -> str | None:
    """Return what is wrong with the output of the commands, run in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                rig.mixchat(*arguments)()
            except SystemExit as ending:
                return int(ending.code or 0), out.getvalue(), err.getvalue()
        raise AssertionError

    return _judge([call(command, _name(model)) for command in COMMANDS], expected)


def _by_command(model: Path, expected: str) -> str | None:
    """Return what is wrong with the output of the real commands."""
    mixchat = str(Path(sys.executable).with_name("mixchat"))
    answers = []
    for command in COMMANDS:
        done = subprocess.run([mixchat, command, _name(model)], capture_output=True, text=True)
        answers.append((done.returncode, done.stdout, done.stderr))
    return _judge(answers, expected)


def _name(model: Path) -> str:
    return rig.REPO if model.name == rig.KEY else model.name


def _judge(answers: list[tuple[int, str, str]], expected: str) -> str | None:
    codes = [code for code, _, _ in answers]
    right = codes == [6, 0, 0] and answers[0][1] == f"damaged: {expected}\n"
    return None if right else str(answers)


if __name__ == "__main__":
    sys.exit(main())
