"""Carries out the steps of tests/gpu.sh, and writes the report line by line as they come."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

from gpu_trial import LEFT_OUT, SECONDS, Step

_KEPT_LINES = 12  # of a failure
_DRAIN_S = 5.0  # until the last lines of a step have come
_CLOCKS = {
    "clocks.sm": "MHz",
    "clocks.mem": "MHz of memory",
    "power.draw": "W",
    "temperature.gpu": "C",
}
_REASONS = "clocks_throttle_reasons.active"
_USUAL_REASONS = ("0x0000000000000000", "0x0000000000000001")  # none, and an idle card


def run_all(
    steps: Sequence[Step],
    report: Path,
    command: Callable[[Step], list[str]],
    seconds: float = SECONDS,
) -> int:
    """Run each step's command, write the report, and return the exit status.

    A line stands in the report as soon as its step has printed it. What a step writes to stderr is
    in FILE.log.
    """
    end, failed = time.monotonic() + seconds, False
    clocks = Clocks(Path(f"{report}.clocks"))
    with report.open("w") as text, Path(f"{report}.log").open("w") as log, clocks:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=text, flush=True)

        tell(f"mixchat on a GPU, {time.strftime('%Y-%m-%d %H:%M')}")
        for step in steps:
            start = time.monotonic()
            limit = min(step.limit_s, end - start)
            tell(f"\n{step.name:<10} {step.proves}")
            print(f"== {step.name}", file=log, flush=True)
            result, errors = "no time left", ""
            if limit > 1:
                result, errors = _carried_out(command(step), limit, log, tell)
            for line in clocks.since_last():
                tell(f"    {line}")
            if result not in ("ok", "left out"):
                failed = True
                for line in errors.splitlines()[-_KEPT_LINES:]:
                    tell(f"    | {line}")
            tell(f"{step.name:<10} {result:<12} {time.monotonic() - start:>8.1f} s")
    return int(failed)


def _carried_out(
    command: list[str], limit_s: float, log: IO[str], tell: Callable[[str], None]
) -> tuple[str, str]:
    """Return the result of a command in words, and its errors. Tell each line that it prints."""
    log_start = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            tell(f"    {line.rstrip()}")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(limit_s)
        result = {0: "ok", LEFT_OUT: "left out"}.get(code, f"FAILED {code}")
    except subprocess.TimeoutExpired:
        result = f"FAILED: over {limit_s:.0f} s"
    finally:
        # Its own processes, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(_DRAIN_S)
    if not reader.is_alive():  # or it waits for a process that left the group
        stdout.close()
    with Path(log.name).open("rb") as written:
        written.seek(log_start)
        return result, written.read().decode(errors="replace")


class Clocks:
    """The clocks, power and throttling of the first card, each second, if nvidia-smi tells them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # lines of the file
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if (program := shutil.which("nvidia-smi")) is not None:
            query = f"--query-gpu={','.join([*_CLOCKS, _REASONS])}"
            options = [query, "--format=csv,noheader,nounits", "--id=0", "--loop=1"]
            with self._path.open("w") as file:
                self._process = subprocess.Popen(
                    [program, *options], stdout=file, stderr=subprocess.DEVNULL
                )
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def since_last(self) -> list[str]:
        """Return lines about the seconds since the last call, none if nothing is known of them."""
        if self._process is None:
            return []
        lines = self._path.read_text().splitlines()
        rows = [line.split(", ") for line in lines[self._read :]]
        self._read = len(lines)
        rows = [row for row in rows if len(row) == len(_CLOCKS) + 1]
        if not rows:
            return []
        texts = []
        *columns, reasons = zip(*rows, strict=True)
        for unit, column in zip(_CLOCKS.values(), columns, strict=True):
            with contextlib.suppress(ValueError):  # "[N/A]"
                numbers = [*map(float, column)]
                texts.append(f"{min(numbers):.0f} to {max(numbers):.0f} {unit}")
        slowed = sorted({*reasons} - {*_USUAL_REASONS})
        why = f"slowed down, by reasons {' '.join(slowed)}" if slowed else "never slowed down"
        return [f"card: {', '.join(texts)}, {why}"]
