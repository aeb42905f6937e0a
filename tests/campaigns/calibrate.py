"""Cuts off calibrations and conversions of a tiny model at drawn moments, and resumes them.

    python tests/campaigns/calibrate.py [--rounds 40] [--seed 0]

In turn by SIGKILL, by Ctrl-C and by a full disk, up to three times in each round. After each, the
model has to be intact and has to answer, while its checkpoint is away. Sometimes the same command
then gets a checkpoint with one other weight, which has to be refused. In the end the model has to
be equal, to the byte, to one that was left in peace. The disk is a small one of its own, which
takes root to mount. Exit code 0: no fault was found.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import rig

DISK = 64_000_000
NAME = "tiny"
MOST = 3  # times that one calibration is cut off
# The exit codes of a calibration that was cut off; a signal that comes early ends it by itself.
CODES = {
    "SIGKILL": (-signal.SIGKILL,),
    "Ctrl-C": (130, -signal.SIGINT),
    "full disk": (7,),
}


class Calibrations:
    """Models that are calibrated below `work`, and what came of it."""

    def __init__(self, work: Path, seed: int) -> None:
        self.chance, self.at = random.Random(seed), Counter[str]()
        self.faults: list[str] = []
        self._out, self._base = work / "out", work / "base"
        self._disk, self._models = work / "home", work / "home/models"
        self._model = self._models / NAME
        text = work / "text.txt"
        text.write_text("Some words to read, and some more of them. " * 60)
        self._commands = [
            ("calibrate", NAME),
            ("calibrate", NAME, "--calibrate-text", str(text)),
        ]
        self._source = rig.make_checkpoint(work / "source", seed, **rig.SMALL)
        download = ("download", str(self._source), "--name", NAME, "--dense-bits", "16")
        self._expect(0, *download)
        shutil.copytree(self._model, self._base)
        self._answers = {self._answer()}
        self._in_peace(0)  # measures the machine and compiles the kernels
        self._wholes = [self._in_peace(number) for number in range(len(self._commands))]

    def _in_peace(self, number: int) -> tuple[dict[str, str], float, int]:
        """Return the files of an undisturbed calibration, its seconds, and the disk it took."""
        self._begin()
        began, used = time.monotonic(), [shutil.disk_usage(self._disk).used]
        pid = rig.fork(rig.mixchat(*self._commands[number]), self._out)
        code = rig.wait(pid, meanwhile=lambda: used.append(shutil.disk_usage(self._disk).used))
        assert code == 0, self._out.read_text()
        return rig.digests(self._model), time.monotonic() - began, max(used) - used[0]

    def _begin(self) -> None:
        shutil.rmtree(self._models)
        shutil.copytree(self._base, self._model)

    def round(self, how: str) -> None:
        """Change one model, cut off in this way until it is whole or was so often enough."""
        number = self.chance.randrange(len(self._commands))
        reference, seconds, most = self._wholes[number]
        self._begin()
        for _ in range(self.chance.randint(1, MOST)):
            at = self.chance.random() * seconds
            room = self.chance.randrange(self.chance.choice((20_000, most)))
            code = self._cut_off(how, self._commands[number], at, room)
            place = self._place()
            self.at[f"{how}, {place}" if code else f"{how}, never"] += 1
            where = f"{number}, {how} after {at:.3f} s, room {room:,}, {place}"
            self._check(how, code, where)
            self._check_use(number, where)
            if place.startswith("after"):
                break
            if self.chance.random() < 0.5:
                self._check_other(number, where)
        else:
            self._expect(0, *self._commands[number])
        self._expect(0, "gc")
        if rig.digests(self._models) != {f"{NAME}/{k}": v for k, v in reference.items()}:
            self.faults.append(f"{how}, command {number}, last {place}: other files in the end")

    def _cut_off(self, how: str, command: tuple[str, ...], at: float, room: int) -> int | None:
        """Run a calibration that is cut off after so many seconds; return its exit code."""
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the child begins as `mixchat` does
        pid = rig.fork(rig.mixchat(*command), self._out)
        signal.signal(signal.SIGINT, before)
        time.sleep(at)
        if how == "full disk":
            code = rig.wait(pid, meanwhile=lambda: self._fill(room))
            (self._disk / "filling").unlink(missing_ok=True)
            return code
        os.kill(pid, signal.SIGKILL if how == "SIGKILL" else signal.SIGINT)
        return rig.wait(pid)

    def _fill(self, room: int) -> None:
        """Fill the disk but for `room`; what the calibration has freed since is taken, too."""
        more = shutil.disk_usage(self._disk).free - room
        with open(self._disk / "filling", "ab") as file, contextlib.suppress(OSError):
            if more > 0:
                os.posix_fallocate(file.fileno(), file.tell(), more)

    def _place(self) -> str:
        """Return the stage of the work, by its files."""
        from mixchat.weights.format.journal import Journal
        from mixchat.weights.format.manifest import read_manifest
        from mixchat.weights.format.workspace import INPUTS_DIR, workspace

        place = workspace(self._model)
        if read_manifest(self._model) != read_manifest(self._base):
            return "after the swap" if place.exists() else "after the end"
        if (made := Journal(place).made) or (place / "model").exists():
            return f"{len(made)} files made"
        return "inputs recorded" if (place / INPUTS_DIR).exists() else "nothing made yet"

    def _check(self, how: str, code: int | None, where: str) -> None:
        text = self._out.read_text()
        if code not in (0, *CODES[how]):
            self.faults.append(f"{where}: exit {code}: {text[-300:]}")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if "Traceback" in text or len(errors) != (code == 7):
            self.faults.append(f"{where}: not one clear line: {text[-600:]}")
        self._expect(0, "verify", NAME)

    def _check_use(self, number: int, where: str) -> None:
        """Use the model while the checkpoint is away; a conversion keeps its answers."""
        away = self._source.rename(self._source.with_name("away"))
        self._expect(0, "verify", NAME)
        self._expect(0, "list")
        answer = self._answer()
        if number >= 2 and answer not in self._answers:
            self.faults.append(f"{where}: another answer: {answer!r}")
        away.rename(self._source)
        self.at["used while the checkpoint was away"] += 1

    def _answer(self) -> str:
        self._expect(0, "run", "-q", "-m", NAME, "--temp", "0", "-n", "8", "hello")
        return self._out.read_text()

    def _check_other(self, number: int, where: str) -> None:
        """Resume with a checkpoint of which one weight of the last expert is another."""
        path = max(self._source.glob("*.safetensors"))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x80]))
        self._expect(6, *self._commands[number])
        if f"{path.name} is not what" not in (said := self._out.read_text()):
            self.faults.append(f"{where}: the file is not named: {said[-300:]}")
        self._check_use(number, where)
        path.write_bytes(whole)
        self.at["refused with another weight"] += 1

    def _expect(self, expected: int, *command: str) -> None:
        if (code := rig.wait(rig.fork(rig.mixchat(*command), self._out))) != expected:
            self.faults.append(f"{command}: exit {code}: {self._out.read_text()[-300:]}")


def warm_up() -> None:
    """Import what children need, and let them calibrate with few tokens."""
    rig.warm_up()
    import mixchat.cli.download
    import mixchat.face.load
    import mixchat.text.checkpoint_text  # noqa: F401
    from mixchat.loading import calibrate

    calibrate.WINDOW = 32


def main() -> int:
    """Run the campaign and return the exit code."""
    options = rig.parsed(__doc__, rounds=40, seed=0)
    began = time.monotonic()
    with rig.workplace() as work, rig.small_disk(work / "home", DISK):
        warm_up()
        calibrations = Calibrations(work, options.seed)
        for number in range(options.rounds):
            calibrations.round(list(CODES)[number % len(CODES)])
    rig.table(
        f"calibrations and conversions: {options.rounds} rounds, {time.monotonic() - began:.0f} s",
        dict(sorted(calibrations.at.items())),
    )
    return rig.told(calibrations.faults)


if __name__ == "__main__":
    sys.exit(main())
