"""A command line as the tests start it, and what it leaves behind."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from patience import PATIENCE_S

FAKE = [sys.executable, str(Path(__file__).with_name("fake_mixchat.py"))]


@dataclass
class Done:
    """The output and the exit code of a command line."""

    stdout: bytes
    stderr: bytes
    returncode: int


PRINT_MODULES = """
import sys
from mixchat.cli.app import run
try:
    run(sys.argv[1:])
finally:
    print(*(name for name in sys.modules if "." not in name), file=sys.stderr)
"""


def loaded_by(environment, *arguments):
    """Run a command, and return its exit code, its output, and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_MODULES, *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
    )
    return done.returncode, done.stdout, set(done.stderr.splitlines()[-1].split())
