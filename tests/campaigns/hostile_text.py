"""Chat templates and tokenizers that loop, grow, abort or crash: `download` refuses each."""

import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import rig
from hostile import Found, judged

sys.path.insert(0, str(rig.HERE.parent / "text"))
import hostile_programs as programs

HARMLESS = ("id of 4,294,967,295",)


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Download a good checkpoint with each hostile program."""
    whole = rig.make_checkpoint(work / "whole", 3, 1 << 40, **{**rig.TINY, "vocab_size": 512})
    (whole / "tokenizer.model").unlink()
    rows: dict[str, object] = {}
    most = 0
    for label, write in _programs():
        source = work / "bad"
        shutil.copytree(whole, source)
        write(source)
        began, found.memory = time.monotonic(), 0
        code = judged(rig.mixchat("download", str(source)), work / "out", label, found)
        rows[label] = f"{time.monotonic() - began:4.1f} s, {found.memory // 10**6:4} MB"
        most = max(most, found.memory)
        found.counts["refused" if code == 6 else "accepted"] += 1
        if code != 6 and label not in HARMLESS:
            found.failures.append(f"{label}: exit {code}")
        shutil.rmtree(source)
        shutil.rmtree(os.environ["MIXCHAT_HOME"], ignore_errors=True)
    found.memory = most
    rig.table("time and most memory of a process", rows)


def _programs() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for label, source in programs.TEMPLATES.items():
        yield label, lambda directory, source=source: programs.template(directory, source)
    for label in programs.TOKENIZERS:
        yield label, lambda directory, label=label: programs.tokenizer(directory, label)
