"""The campaigns of killed, raced and interrupted processes, each for a few rounds."""

import pytest
from campaign_runs import assert_finds_no_fault


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["kill.py", "--rounds", "3"],
        ["kill.py", "--rounds", "2", "--gguf", "1"],
        ["race.py", "--rounds", "1"],
        ["resume.py", "--races", "5", "--processes", "3"],
        ["interrupts.py", "--rounds", "30"],
        ["flips.py", "--flips", "8", "--real", "1"],
    ],
    ids=lambda command: command[0],
)
def test_finds_no_fault(command, tmp_path):
    assert_finds_no_fault(command, tmp_path)
