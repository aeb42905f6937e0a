"""The report of a run's experts, and its form in JSON."""

from dataclasses import replace

import pytest

from mixchat.engine.report import (
    PLACES,
    TIERS,
    ExpertReport,
    load_report,
    save_report,
    saved_uses,
    slots_in_words,
)
from mixchat.experts.cache import ExpertKey

REPORT = ExpertReport(
    model="demo",
    hits=[[3, 0], [1, 1]],
    misses=[[1, 0], [2, 0]],
    tiers=[["device", "disk"], ["host", "device"]],
    slots={"device": 2, "host": 1},
    bytes_moved=300,
    stalled_seconds=0.5,
    predictions=4,
    right_predictions=3,
    tokens=2,
    seconds=1.5,
)


def test_the_names_in_json_are_those_that_scripts_read():
    raw = REPORT.to_dict()
    assert (raw["guesses"], raw["right_guesses"]) == (4, 3)
    assert [name for name in raw if "prediction" in name] == []


@pytest.mark.parametrize(
    ("tiers", "slots", "used"),
    [
        (REPORT.tiers, REPORT.slots, ["device", "host", "disk"]),
        ([["worker", "disk"]] * 2, {"host": 1, "worker": 2}, ["host", "worker", "disk"]),
        (
            [["device", "other-device"], ["host", "device"]],
            {"device": 2, "other-device": 3},
            ["device", "other-device", "host"],
        ),
    ],
)
def test_a_report_comes_back_from_its_file_and_knows_its_tiers(tmp_path, tiers, slots, used):
    report = replace(REPORT, tiers=tiers, slots=slots)
    save_report(tmp_path / "report", report)
    assert load_report(tmp_path / "report") == report
    assert report.tiers_used == used


def test_the_uses_of_the_saved_run_are_its_hits_and_misses(tmp_path):
    save_report(tmp_path / "report", REPORT)
    assert saved_uses(tmp_path / "report") == {
        ExpertKey(0, 0): 4,
        ExpertKey(1, 0): 3,
        ExpertKey(1, 1): 1,
    }


@pytest.mark.parametrize("text", [None, "", "{}", '{"hits": 3}'])
def test_without_a_report_no_expert_was_used(tmp_path, text):
    if text is not None:
        (tmp_path / "report").write_text(text)
    assert saved_uses(tmp_path / "report") == {}


def test_every_tier_has_a_name_for_people():
    assert list(PLACES) == list(TIERS)
    assert slots_in_words({"host": 12, "worker": 8}) == "12 RAM slots, 8 worker slots"


def test_what_a_later_version_adds_to_a_report_is_no_fault():
    assert ExpertReport.from_dict(REPORT.to_dict() | {"more": 1}) == REPORT
