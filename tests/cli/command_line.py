"""How the tests start a command line, and what it leaves behind."""

import sys
from dataclasses import dataclass
from pathlib import Path

FAKE = [sys.executable, str(Path(__file__).with_name("fake_mixchat.py"))]


@dataclass
class Done:
    """What a command line left behind."""

    stdout: bytes
    stderr: bytes
    returncode: int
