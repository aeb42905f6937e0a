"""The campaigns, each for a few rounds: at full size a person runs them by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGNS = Path(__file__).parent / "campaigns"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["kill.py", "--rounds", "3"],
        ["kill.py", "--rounds", "2", "--gguf", "1"],
        ["race.py", "--rounds", "1"],
        ["resume.py", "--races", "5", "--processes", "3"],
        ["interrupts.py", "--rounds", "100"],
        ["flips.py", "--flips", "8", "--real", "1"],
        ["hub_faults.py", "--rounds", "2"],
        ["hostile_requests.py", "--rounds", "0.02"],
        ["crowd.py", "--count", "200", "--files", "160", "--seconds", "2"],
        ["hostile.py", "--parts", "mutations", "--mutations", "40"],
    ],
    ids=lambda command: command[0],
)
def test_finds_no_fault(command, tmp_path):
    # conftest.py keeps this process offline; the campaigns have a hub of their own.
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, CAMPAIGNS / command[0], *command[1:]],
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
