"""Runs a campaign for a few rounds. At full size a person runs it by hand."""

import os
import subprocess
import sys
from pathlib import Path

CAMPAIGNS = Path(__file__).parents[1] / "campaigns"


def assert_finds_no_fault(command, tmp_path):
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
