"""A command line as the tests start it, and what it leaves behind."""

import sys
from dataclasses import dataclass
from pathlib import Path

FAKE = [sys.executable, str(Path(__file__).with_name("fake_mixchat.py"))]


@dataclass
class Done:
    """The output and the exit code of a command line."""

    stdout: bytes
    stderr: bytes
    returncode: int
