"""The count of threads that torch uses."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from mixchat.base import machine
from mixchat.install.known_models import KNOWN
from mixchat.install.source.demo import DEMO_CONFIG
from mixchat.planning import torch_threads
from mixchat.planning.compute_speed import Effort, thread_seconds
from mixchat.planning.torch_threads import candidates, choose_threads, known_or_best
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel

BLUEPRINT = Blueprint(read_config(KNOWN["instruct"].config), Quantization())
DEMO = Blueprint(read_config(DEMO_CONFIG), Quantization())


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch_threads._torch_default.cache_clear()
    yield
    torch.set_num_threads(before)
    torch_threads._torch_default.cache_clear()


@pytest.fixture(autouse=True)
def share(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let other programs take these shares of the cores, one a measurement, and then nothing."""
    shares: list[float] = []
    monkeypatch.setattr(
        machine.OtherPrograms, "share", lambda programs: shares.pop(0) if shares else 0.0
    )
    return shares


class Machine:
    """Says how long each count of threads takes, and counts how often it was asked."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, counts: Sequence[int]) -> Mapping[int, float]:
        self.calls += 1
        return {count: self.seconds[count] for count in counts}


@pytest.mark.parametrize(
    ("physical", "usable", "counts"),
    [
        (1, 1, [1]),
        (2, 2, [1, 2]),
        (8, 16, [1, 8, 16, 6]),  # two threads a core
        (12, 20, [1, 12, 20, 9]),  # eight fast cores and four slow ones
        (16, 2, [1, 2]),  # a container with the time of two
    ],
)
def test_the_counts_worth_a_try(physical, usable, counts):
    assert candidates(physical, usable) == counts


def test_the_fastest_is_taken_and_remembered(tmp_path):
    path, measure = tmp_path / "new" / "threads.json", Machine({8: 1.0, 16: 1.2, 6: 0.8})
    assert [known_or_best(path, "a shape", [8, 16, 6], measure) for _ in range(2)] == [6, 6]
    assert measure.calls == 1
    assert known_or_best(path, "a shape", [8, 16], measure) == 8  # another machine
    assert measure.calls == 2
    assert len(json.loads(path.read_text())) == 2


def test_a_count_of_a_busy_machine_is_measured_again_ten_minutes_later(
    tmp_path, share, monkeypatch
):
    """A first start in a busy minute left a person with one thread, half of the speed, for ever."""
    path, share[:] = tmp_path / "threads.json", [0.5, 0.1]
    now = time.time()
    monkeypatch.setattr(torch_threads.time, "time", lambda: now)
    assert known_or_best(path, "a shape", [1, 2], Machine({1: 1.0, 2: 1.0})) == 1
    now += 599
    assert known_or_best(path, "a shape", [1, 2], Machine({})) == 1
    now += 2
    assert known_or_best(path, "a shape", [1, 2], Machine({1: 2.0, 2: 1.0})) == 2
    now -= 1e6
    assert known_or_best(path, "a shape", [1, 2], Machine({})) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[]",
        lambda text: "{",
        lambda text: '{"x": 1}',
        lambda text: text.replace("16\n", "1000\n"),
    ],
    ids=["a list", "cut short", "another object", "a count that cannot be"],
)
def test_a_damaged_file_is_written_again(tmp_path, damage):
    path, measure = tmp_path / "threads.json", Machine({8: 1.0, 16: 0.5})
    known_or_best(path, "a shape", [8, 16], measure)
    path.write_text(damage(path.read_text()))
    for _ in range(2):
        assert known_or_best(path, "a shape", [8, 16], measure) == 16
    assert measure.calls == 2


def test_where_nothing_can_be_written_it_is_measured_each_time(tmp_path):
    (tmp_path / "file").write_text("")
    measure = Machine({8: 1.0, 16: 0.5})
    assert known_or_best(tmp_path / "file" / "threads.json", "a shape", [8, 16], measure) == 16


def test_each_shape_gets_the_count_that_was_measured_for_it(monkeypatch, tmp_path):
    """Small experts always got one thread, which cost models of many of them a third."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    seconds = {BLUEPRINT: {1: 3.0, 2: 1.0, 4: 0.5}, DEMO: {1: 1.0, 2: 1.0, 4: 1.0}}
    monkeypatch.setattr(torch_threads, "thread_seconds", lambda model, counts: seconds[model])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for _ in range(2):  # the second time it is not taken for the machine's own
        choose_threads(BLUEPRINT)
        assert torch.get_num_threads() == 4
        choose_threads(DEMO)
        assert torch.get_num_threads() == 1


def test_what_a_person_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    choose_threads(BLUEPRINT)
    choose_threads(DEMO)
    assert torch.get_num_threads() == 2


def test_layers_with_experts_are_computed_with_each_count_and_the_count_is_as_before(
    tiny_model, monkeypatch
):
    with InstalledModel(tiny_model) as installed:
        blueprint = installed.blueprint
    seen, compute = set(), Expert.__call__

    def counted(expert: Expert, x: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return compute(expert, x)

    monkeypatch.setattr(Expert, "__call__", counted)
    effort = Effort(pool_bytes=200_000, seconds=0.01)
    seconds = thread_seconds(blueprint, [1, 2], effort)
    assert set(seconds) == seen == {1, 2}
    assert all(0 < taken < math.inf for taken in seconds.values())
    assert torch.get_num_threads() == 2
