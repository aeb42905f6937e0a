"""`plan --worker`: who holds what, and how fast it is."""

import json
import re

import pytest
from plan_tools import sections, verdict

from mixchat.loading import plan
from mixchat.planning.worker_split import WorkerOffer


@pytest.fixture
def offered(monkeypatch):
    """Workers with these offers, whatever their addresses; returns the list to fill."""
    offers = []
    monkeypatch.setattr(plan, "ask_workers", lambda installed, options: offers)
    return offers


def test_with_workers_it_says_who_holds_what_and_how_fast_it_is_with_them_and_without(
    planned, measured, offered, tiny_model
):
    offered += [
        WorkerOffer("10.0.0.2:7917", 3, 0.004, 2e-4),
        WorkerOffer("10.0.0.3:80", 4, 0.0035, 1e-3),
    ]
    arguments = (str(tiny_model), "--host-memory", "40%", "--worker", "10.0.0.2")
    done = planned(*arguments)
    shown, speed = sections(done), verdict(done)["speed"]
    assert list(shown)[4:6] == ["What to expect", "With workers"]
    lines = [
        re.split(" {2,}", line.strip(), maxsplit=1) for line in shown["With workers"].split("\n")
    ]
    assert lines[:-1] == [
        ["10.0.0.2:7917", "holds 3 experts, with room for 3"],
        ["takes 4 ms for an expert and a token, and 0.2 ms for the way there and back"],
        ["10.0.0.3:80", "holds 4 experts, with room for 4"],
        ["takes 3.5 ms for an expert and a token, and 1 ms for the way there and back"],
        ["this machine", "holds 3 experts, 1 of them copies of a worker's"],
        ["disk", "not used after loading"],
        ["decode", lines[6][1]],
        [lines[7][0]],
    ]
    assert re.fullmatch(r"\d+ tok/s: a token takes [\d.]+ ms", lines[6][1])
    assert re.fullmatch(r"[\d.]+ ms computing", lines[7][0])
    assert re.fullmatch(r"[\d.]+ ms waiting for workers, beyond .*", lines[8][0])
    alone = re.search(r"decode +(.* tok/s)", shown["What to expect"])[1]
    with_them = re.match(r".* tok/s", lines[6][1])[0]
    assert f"{with_them} with 2 workers, {alone} without, faster than you read" in speed


def test_as_json_it_has_what_workers_offer_and_hold(planned, measured, offered, tiny_model):
    assert json.loads(planned(str(tiny_model), "--json").stdout)["workers"] is None
    offered.append(WorkerOffer("10.0.0.2:7917", 2, 0.004, 2e-4))
    arguments = (str(tiny_model), "--host-memory", "40%", "--worker", "10.0.0.2", "--json")
    found = json.loads(planned(*arguments).stdout)
    assert found["workers"]["offers"] == [
        {
            "address": "10.0.0.2:7917",
            "slots": 2,
            "expert_seconds": 0.004,
            "round_trip": 2e-4,
            "held": 2,
        }
    ]
    assert found["workers"]["experts"] == {"here": 3, "copies": 0, "workers": 2, "disk": 3}
    assert found["workers"]["cost"]["waiting"] > 0
    rate = found["workers"]["tokens_per_second"]
    assert rate == pytest.approx(1 / found["workers"]["cost"]["seconds"])
    assert rate != found["tokens_per_second"]


def test_workers_are_of_no_use_before_the_model_is_installed(planned, measured, offered):
    done = planned("instruct", "--worker", "10.0.0.2")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        "error: --worker is for an installed model, and instruct is not installed",
        "hint: Workers serve only the same model as this machine's: install it on each of them.",
    ]
    assert measured == []
