"""Fills a small disk at forty moments of a download, and resumes it when there is room."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rig
from counted_hub import Hub

DISK = 48_000_000
FULL = 7


class Filling:
    """Fills the disk but for `room` when the share `when` of the weights is made; 0 is at once."""

    def __init__(self, shown: Any, disk: Path, room: int | None, when: float) -> None:
        self.shown, self.disk, self.room, self.when = shown, disk, room, when

    def note(self, text: str) -> None:
        self.shown.note(text)

    def task(self, what: str, total: int, done: int = 0) -> Any:
        task = self.shown.task(what, total, done)
        if what == "quantizing" and self.when:
            bar, count = task, itertools.count()
            made = [done]

            def advance(amount: int) -> None:
                made[0] += amount
                bar.advance(amount)
                if made[0] >= self.when * total and not next(count):
                    self.fill()

            return SimpleNamespace(advance=advance, close=bar.close)
        return task

    def fill(self) -> None:
        if self.room is not None:
            free = shutil.disk_usage(self.disk).free
            with open(self.disk / "filling", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - self.room))


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, rounds=40, seed=0, gguf=0)
    chance, failures, at = random.Random(options.seed), [], Counter[str]()
    began = time.monotonic()
    with rig.workplace() as work, rig.small_disk(disk := work / "home", DISK):
        rig.warm_up()
        with Hub(rig.make_source(work / "source", options.seed, gguf=options.gguf)):
            reference, most = _reference(work, disk)
            failures += _beforehand(work, disk)
            struck = 0
            for number in range(options.rounds):
                # Room for nothing up to all that is ever taken; or hardly any, but later on.
                share = (number // 2 * 2 + 2 * chance.random()) / options.rounds
                late = number % 2 == 1
                room = chance.randrange(20_000) if late else int(most * share)
                keep = ["--keep-source"] * (number % 5 == 4)
                found, place = _round(work, disk, room, share * late, keep, reference)
                failures += [f"room {room:,}: {text}" for text in found]
                at[place] += 1
                struck += place != "there was room"
    rig.table(
        f"full disk: {options.rounds} rounds, {time.monotonic() - began:.0f} s",
        {
            "most that was taken while there was room": f"{most:,}",
            "rounds in which the disk was full": struck,
            **{f"  {place}": count for place, count in at.most_common()},
        },
    )
    return rig.told(failures)


def _download(
    disk: Path, room: int | None, when: float = 0, keep: bool = False
) -> Callable[[], object]:
    """The real download; once its plan is announced, or later, the disk is filled."""

    def work() -> int:
        from mixchat.cli.output import progress
        from mixchat.install import models
        from mixchat.install.make import download
        from mixchat.install.make.quantize_options import QuantizeOptions

        ref = models.resolve(rig.REPO)
        request = download.DownloadRequest(ref, QuantizeOptions(), keep_source=keep)
        with progress.show_progress() as shown:
            filling = Filling(shown, disk, room, when)

            def announce(plan: Any) -> None:
                if not when:
                    filling.fill()
                # The announced space was free at the time: someone else fills the disk afterwards.
                type(plan).check = lambda self: None

            download.download(request, filling, announce=announce)
        return 0

    return work


def _reference(work: Path, disk: Path) -> tuple[dict[str, str], int]:
    """The undisturbed model, and the most bytes of disk that it took."""
    pid = rig.fork(_download(disk, None), work / "out")
    most = 0
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        most = max(most, shutil.disk_usage(disk).used)
        time.sleep(0.001)
    assert done[1] == 0, (work / "out").read_text()
    reference = rig.digests(disk / "models" / rig.KEY)
    _clear(work, disk)
    return reference, most


def _round(
    work: Path,
    disk: Path,
    room: int,
    when: float,
    keep: list[str],
    reference: dict[str, str],
) -> tuple[list[str], str]:
    """One disk that fills up; what went wrong, and what the download was at."""
    failures = []
    code = rig.wait(rig.fork(_download(disk, room, when, bool(keep)), work / "out"))
    text = (work / "out").read_text()
    target = disk / "models" / rig.KEY
    place = "there was room" if code == 0 else _place(target)
    if code not in (0, FULL):
        failures.append(f"exit code {code}: {text[-300:]}")
    if code:
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or "disk is full" not in errors[0] or "Traceback" in text:
            failures.append(f"not one clear line: {text[-600:]}")
        if rig.wait(rig.fork(_find, work / "out")) != 4:
            failures.append("models.installed_directory takes it for a model")
        if rig.wait(rig.fork(rig.mixchat("verify", rig.REPO), work / "out")) not in (4, 6):
            failures.append(f"verify: {(work / 'out').read_text()[-300:]}")
    (disk / "filling").unlink(missing_ok=True)
    code = rig.wait(rig.fork(rig.mixchat("download", rig.REPO, *keep), work / "out"))
    if code or rig.digests(target) != reference:
        failures.append(f"afterwards: exit {code}: {(work / 'out').read_text()[-300:]}")
    if left := [str(p) for p in disk.rglob("*") if p.is_file() and p.parent != target]:
        failures.append(f"left: {left}")
    _clear(work, disk)
    return failures, place


def _find() -> object:
    from mixchat.install import models

    return models.installed_directory(rig.REPO) and 0


def _place(target: Path) -> str:
    """Return the stage of the download, by its files."""
    place = target.parent / Path(rig.WORKSPACE).name
    if not (place / "journal.jsonl").exists():
        return "before the journal"
    if (place / "model" / "mixchat.copy.json").exists():
        return "at the manifest"
    made = (place / "journal.jsonl").read_bytes().count(b"\n") - 1
    parts = any((place / "source").glob("*.part"))
    return f"{'some' if made else 'nothing'} made{', in the midst of a shard' * parts}"


def _beforehand(work: Path, disk: Path) -> list[str]:
    """Check that the real command refuses before it fetches a shard.

    It has both numbers, if there is room for the small files, which are checked first.
    """
    failures, full = [], "the disk is full"
    for room, said in ((10_000_000, "MB needed, 9."), (8192, full), (0, full)):
        with open(disk / "filling", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)
        command = [str(Path(sys.executable).with_name("mixchat")), "download", rig.REPO]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        _clear(work, disk)
        print("beforehand:", done.returncode, *errors)
        if done.returncode != FULL or len(errors) != 1 or said not in errors[0]:
            failures.append(f"beforehand, {said}: {done.stderr}")
    return failures


def _clear(work: Path, disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work / "hf/hub", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
