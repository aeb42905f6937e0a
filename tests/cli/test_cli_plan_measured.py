"""`plan` measures this machine once, says when, and measures what is outdated again."""

import dataclasses
import json
from pathlib import Path

import pytest
from plan_tools import SPEEDS, at

from mixchat.base import machine
from mixchat.planning import measuring

AGAIN = "note: measuring this machine again: "
BUSY = "note: this machine is busy, so the speeds measured "


def test_a_measurement_has_an_age_and_can_be_made_again(planned, measured, monkeypatch):
    """A measurement stayed for good, without a date, even one of a busy machine."""
    at(monkeypatch, 0)
    assert b"this machine (now)." in planned("instruct").stdout
    at(monkeypatch, 3.5)
    slower = dataclasses.replace(SPEEDS, layer_seconds=0.01)
    monkeypatch.setattr(measuring, "take_speeds", lambda *given: slower)
    made = json.loads(planned("instruct", "--json").stdout)
    assert made["speeds"]["measured_at"] == 1.7e9
    assert b"this machine (3 days ago)." in planned("instruct").stdout
    again = json.loads(planned("instruct", "--json", "--measure").stdout)
    assert again["speeds"]["measured_at"] == 1.7e9 + 3.5 * 86400
    assert again["tokens_per_second"] < made["tokens_per_second"]
    assert json.loads(planned("instruct", "--json").stdout) == again


@pytest.mark.parametrize(
    ("then", "now", "days", "said"),
    [
        (0.1, 0.1, 29, ""),
        (0.1, 0.1, 31, f"{AGAIN}the last time was 31 days ago\n"),
        (0.9, 0.1, 0.1, f"{AGAIN}it was busy the last time, 2 hours ago\n"),
        (0.1, 0.9, 31, f"{BUSY}31 days ago are used\n"),
    ],
)
def test_what_is_outdated_is_measured_again_unless_the_machine_is_busy(
    planned, measured, monkeypatch, then, now, days, said
):
    """On a busy machine a saved measurement was replaced by a worse one, which took minutes."""
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: then)
    at(monkeypatch, 0)
    assert planned("demo").stderr == b""
    before = len(measured)
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: now)
    at(monkeypatch, days)
    done = planned("demo")
    again = said.startswith(AGAIN)
    assert (len(measured) > before) == again
    assert done.stderr.decode() == said
    busy = b"measured on a busy machine" in done.stdout
    assert busy == (then > 0.5 and not again)


def test_a_model_that_was_downloaded_since_is_measured_again_with_its_own_files(
    planned, measured, tiny_model, environment
):
    """A host's cache holds a file that was just written, and gives that faster than a model."""
    assert planned(str(tiny_model)).stderr == b""
    saved = Path(environment["MIXCHAT_HOME"]) / "machine.json"
    made = saved.read_text()
    assert str(tiny_model) in made
    saved.write_text(made.replace(str(tiny_model), str(tiny_model.parent)))
    said = b"note: measuring this machine again: the last time a file just written was read"
    assert planned(str(tiny_model)).stderr.startswith(said)
    assert len(measured) == 2
    assert planned(str(tiny_model)).stderr == b""
    assert len(measured) == 2


def test_a_machine_is_measured_once_for_models_of_one_shape(planned, measured):
    for name in ("instruct", "base", "demo", "instruct", "demo"):
        assert planned(name).returncode == 0
    assert len(measured) == 2
