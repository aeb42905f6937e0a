"""Hostile names, files, pickles, texts, mutations, endless input: one line, nothing harmed."""

import argparse
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rig

MEMORY = 1_500_000_000  # bytes that a child may take
LINE = 400  # characters of an error's line


@dataclass
class Found:
    """The results of a part of the campaign: counts, and failures."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: int = 0


def main() -> int:
    """Run the campaign and return the exit code."""
    import hostile_endless
    import hostile_files
    import hostile_gguf
    import hostile_mutations
    import hostile_names
    import hostile_pickles
    import hostile_text

    every = {
        "names": hostile_names.campaign,
        "files": hostile_files.campaign,
        "gguf": hostile_gguf.campaign,
        "pickles": hostile_pickles.campaign,
        "text": hostile_text.campaign,
        "mutations": hostile_mutations.campaign,
        "endless": hostile_endless.campaign,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=every, default=list(every))
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--only", default="", help="of the names those with this in their label")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    with rig.workplace() as work:
        rig.warm_up()
        for part in options.parts:
            found, began = Found(), time.monotonic()
            (work / part).mkdir()
            every[part](work / part, found, options)
            failed |= bool(found.failures)
            rig.table(
                f"hostile {part}: {time.monotonic() - began:.0f} s",
                {
                    **dict(sorted(found.counts.items())),
                    "most memory of a process": f"{found.memory:,}",
                    "failures": len(found.failures),
                },
            )
            for failure in found.failures[:60]:
                print("FAILED", failure, flush=True)
    return int(failed)


def judged(work: Callable[[], object], output: Path, label: str, found: Found) -> int | None:
    """Run `work` in a child with little memory; it must succeed or print one clear line."""

    def limited() -> object:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        return work()

    pid = rig.fork(limited, output)
    end, status, done = time.monotonic() + 60, 0, 0
    while not done and time.monotonic() < end:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        time.sleep(0.002)
    if not done:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        found.failures.append(f"{label}: not done after 60 s")
        return None
    code = os.waitstatus_to_exitcode(status)
    found.memory = max(found.memory, usage.ru_maxrss * 1024)
    text = output.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code not in (0, 2, 3, 4, 5, 6, 7) or "Traceback" in text:
        found.failures.append(f"{label}: exit {code}: {text[-400:]}")
    elif len(errors) != (code != 0):
        found.failures.append(f"{label}: exit {code} and {len(errors)} lines: {text[-300:]}")
    elif errors and len(errors[0]) > LINE:
        found.failures.append(f"{label}: a line of {len(errors[0]):,}: {errors[0][:200]}")
    if usage.ru_maxrss * 1024 > MEMORY:
        found.failures.append(f"{label}: took {usage.ru_maxrss * 1024:,} bytes of memory")
    return code


def surroundings(directory: Path) -> dict[str, str]:
    """Return everything below by its path: a file's hash, a link's target."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[str(path)] = "directory"
    return found | rig.digests(directory)


if __name__ == "__main__":
    sys.modules["hostile"] = sys.modules["__main__"]
    sys.exit(main())
