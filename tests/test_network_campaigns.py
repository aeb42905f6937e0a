"""The campaigns of hostile servers, requests and files, each for a few rounds."""

import pytest
from campaign_runs import assert_finds_no_fault


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        # Each lie, with and without its length, about one or two of five files.
        ["hub_faults.py", "--rounds", "1", "--every", "4"],
        ["hostile_requests.py", "--rounds", "0.02"],
        ["crowd.py", "--count", "200", "--files", "160", "--seconds", "1"],
        ["hostile.py", "--parts", "mutations", "--mutations", "40"],
    ],
    ids=lambda command: command[0],
)
def test_finds_no_fault(command, tmp_path):
    assert_finds_no_fault(command, tmp_path)
