"""Runs the suite again and again on a busy machine, and names the tests that fail.

    python tests/campaigns/under_load.py --rounds 5 -n3

Meanwhile a process for each core computes, and one fills the page cache. What follows --rounds goes
to pytest. Each failure is printed with its round and how often the test failed in all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_FAILURES = ROOT / ".pytest_cache/v/cache/lastfailed"
_PIECE = 1 << 24  # bytes that are written and read at once
_COMPUTE = "while True: sum(range(10**6))"
_READ = f"""
import sys
while True:
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read({_PIECE}):
            pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options, arguments = parser.parse_known_args()
    counts: Counter[str] = Counter()
    with ExitStack() as load:
        start_load(load)
        for turn in range(options.rounds):
            _FAILURES.unlink(missing_ok=True)
            code = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode
            failed = json.loads(_FAILURES.read_text()) if _FAILURES.exists() else {}
            counts.update(failed.keys())
            print(f"round {turn + 1}: pytest ended with {code}, {len(failed)} failed", flush=True)
    for test, count in counts.most_common():
        print(f"{count} of {options.rounds}: {test}")
    sys.exit(bool(counts))


def start_load(load: ExitStack) -> None:
    """Keep the cores and the page cache busy until `load` is closed."""
    path = Path(load.enter_context(tempfile.TemporaryDirectory(dir=ROOT.parent))) / "pages"
    with path.open("wb") as file:
        for _ in range(psutil.virtual_memory().available // 2 // _PIECE):
            file.write(bytes(_PIECE))
    programs = [[_COMPUTE]] * (os.cpu_count() or 1) + [[_READ, path]]
    for program in programs:
        process = subprocess.Popen([sys.executable, "-c", *program])
        load.callback(process.wait)
        load.callback(process.kill)


if __name__ == "__main__":
    main()
