"""`mixchat stats`, and the reports that it reads."""

import json
import os
from dataclasses import replace

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.engine.report import ExpertReport, load_report, save_report
from mixchat.face.local_models import report_path

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


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The data directory, the same as the fixture `mixchat` gives its commands."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def kept(home):
    """The file with the report of the demo model's last run."""
    save_report(report_path("demo"), REPORT)
    return home / "stats" / "demo.json"


def test_a_model_has_one_report_whatever_it_is_called(home):
    key = "mistralai--Mixtral-8x7B-Instruct-v0.1"
    (home / "models" / f".{key}.mixchat.unfinished").mkdir(parents=True)
    names = ["instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1", key]
    assert {report_path(name) for name in names} == {home / "stats" / f"{key}.json"}


def test_stats_shows_the_last_run(mixchat, kept):
    done = mixchat("stats", "demo")
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode().splitlines()
    assert shown[1].split() == ["0", "4", "75%", "1", "0", "1", "0", "(100%)"]
    assert "2 tokens" in shown[-3]


def test_stats_is_of_the_last_run_unless_a_model_is_named(mixchat, home):
    """After a chat with the demo it asked for a run of instruct."""
    for time, model in enumerate(("demo", "instruct", "base")):
        save_report(report_path(model), replace(REPORT, model=f"of {model}"))
        os.utime(report_path(model), (time, time))
    os.utime(report_path("demo"), (10, 10))
    assert b"of demo" in mixchat("stats").stdout
    assert b"of base" in mixchat("stats", "base").stdout
    assert b"of instruct" in mixchat("stats", MIXCHAT_MODEL="instruct").stdout


def test_json_is_the_report(mixchat, kept):
    assert json.loads(mixchat("stats", "demo", "--json").stdout) == REPORT.to_dict()


def test_before_the_first_run_it_says_how_to_make_a_report(mixchat):
    done = mixchat("stats", "some/model")
    assert (done.returncode, done.stdout) == (4, b"")
    assert done.stderr.decode().splitlines() == [
        "error: there is no report of a run of 'some/model' yet",
        "hint: mixchat run -m some/model saves one.",
    ]


BAD = {
    "nothing": b"",
    "half": json.dumps(REPORT.to_dict()).encode()[:100],
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "an empty object": b"{}",
} | {
    f"{key}={value!r}": json.dumps(REPORT.to_dict() | {key: value}).encode()
    for key, values in {
        "model": [None],
        "hits": [5, [[1, 2]], ["ab", "cd"], [[1, -1], [1, 1]], [[1.5, 0], [0, 0]]],
        "misses": [{"ab": 1, "cd": 2}, [[True, 0], [0, 0]], [[10**400, 0]] * 2],
        "tiers": [[[], []], [["moon", "disk"]] * 2, [[[], "disk"]] * 2],
        "slots": [[], {"device": "2"}],
        "tokens": [-1, 1.5],
        "seconds": [float("nan"), -1, "x"],
    }.items()
    for value in values
}


def test_a_damaged_report_is_one_clear_line(mixchat, kept):
    for name, data in BAD.items():
        kept.write_bytes(data)
        done = mixchat("stats", "demo")
        assert (done.returncode, done.stdout) == (6, b""), name
        error, hint = done.stderr.decode().splitlines()
        assert error.startswith(f"error: {kept}: not ")
        assert "mixchat run" in hint


def test_a_report_is_not_written_through_a_link(home, tmp_path):
    precious, path = tmp_path / "precious", report_path("demo")
    precious.write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(precious)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        load_report(path)
    save_report(path, REPORT)
    assert precious.read_text() == "precious"
    assert load_report(path) == REPORT
