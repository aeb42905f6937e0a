"""The report of a run's experts, and its form in JSON."""

import json
from dataclasses import replace
from pathlib import Path

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


def test_the_names_in_json_are_those_that_scripts_read() -> None:
    raw = REPORT.to_dict()
    assert (raw["guesses"], raw["right_guesses"]) == (4, 3)
    assert [name for name in raw if "prediction" in name] == []


def test_a_report_comes_back_from_json() -> None:
    assert ExpertReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT


def test_a_report_of_a_run_with_workers_is_read_like_others(tmp_path: Path) -> None:
    spread = replace(REPORT, tiers=[["worker", "disk"]] * 2, slots={"host": 1, "worker": 2})
    save_report(tmp_path / "report", spread)
    assert load_report(tmp_path / "report") == spread


def test_the_uses_of_the_saved_run_are_its_hits_and_misses(tmp_path: Path) -> None:
    save_report(tmp_path / "report", REPORT)
    assert saved_uses(tmp_path / "report") == {
        ExpertKey(0, 0): 4,
        ExpertKey(1, 0): 3,
        ExpertKey(1, 1): 1,
    }


@pytest.mark.parametrize("text", [None, "", "{}", '{"hits": 3}'])
def test_without_a_report_no_expert_was_used(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report").write_text(text)
    assert saved_uses(tmp_path / "report") == {}


def test_every_tier_has_a_name_for_people() -> None:
    assert list(PLACES) == list(TIERS)
    assert slots_in_words({"host": 12, "worker": 8}) == "12 RAM slots, 8 worker slots"


def test_a_report_with_a_second_gpu_comes_back_and_knows_its_tiers() -> None:
    raw = REPORT.to_dict()
    raw["tiers"] = [["device", "other-device"], ["host", "device"]]
    raw["slots"] = {"device": 2, "other-device": 3}
    report = ExpertReport.from_dict(json.loads(json.dumps(raw)))
    assert report.tiers_used == ["device", "other-device", "host"]
    assert REPORT.tiers_used == ["device", "host", "disk"]


def test_what_a_later_version_adds_to_a_report_is_no_fault() -> None:
    assert ExpertReport.from_dict(REPORT.to_dict() | {"more": 1}) == REPORT


@pytest.mark.parametrize("name", ["hits", "misses", "tiers"])
def test_matrices_of_different_shapes_are_no_report(name: str) -> None:
    raw = REPORT.to_dict()
    raw[name] = [layer[:1] for layer in raw[name]]
    with pytest.raises(ValueError, match="differ in shape"):
        ExpertReport.from_dict(raw)


@pytest.mark.parametrize("name", list(REPORT.to_dict()))
def test_nothing_may_be_missing_of_a_report(name: str) -> None:
    raw = REPORT.to_dict()
    del raw[name]
    with pytest.raises(KeyError, match=name):
        ExpertReport.from_dict(raw)
