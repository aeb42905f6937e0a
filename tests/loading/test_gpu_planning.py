"""Devices, and what planning and the bench learn of GPUs on paper (see paper_gpu.py)."""

from dataclasses import replace

import pytest
import torch

from mixchat.base.errors import UsageError
from mixchat.bench.rounds import LimitsMeter
from mixchat.loading.devices import usable_devices
from mixchat.planning import bandwidth, gpu_speed, measuring
from mixchat.planning.gpu_speed import measure_gpu
from mixchat.planning.hardware import Machine
from mixchat.planning.measuring import estimated_speeds, measurement_key


def test_devices_that_do_not_go_together_are_refused(paper):
    paper.devices = 2
    assert [str(device) for device in usable_devices("paper").devices] == ["paper:0", "paper:1"]
    for names in (None, "paper:0,paper:1"):
        assert usable_devices(names) == usable_devices("paper")
    assert paper.current_device() == 0
    for names, said in {
        "paper:0,paper:0": "names 'paper:0' twice",
        "cpu,paper:0": "'cpu' has to stand alone",
        "paper,paper:1": "'paper' has to stand alone",
        "cpu:0,paper:1": "only GPUs compute together",
        "paper:1,paper:2": "torch sees 2 GPUs here",
        "paper:0,": "has to stand alone",
    }.items():
        with pytest.raises(UsageError, match=said):
            usable_devices(names)


def test_planning_looks_at_every_gpu(paper, tmp_path):
    paper.devices = 2
    paper.memory(torch.device("paper", 1)).total = 10**9
    there = Machine.now(tmp_path, usable_devices(None).devices)
    _, other = there.gpus
    assert (other.device, other.name, other.memory) == ("paper:1", "GPU on paper", 10**9)
    assert there.free.other_gpus["paper:1"] <= 10**9 < (there.free.device or 0)


def test_the_first_gpu_is_taken_if_none_is_named_and_one_that_is_not_there_is_refused(paper):
    assert usable_devices(None).devices == [torch.device("paper:0")]
    with pytest.raises(UsageError, match="torch sees 1 GPU here"):
        usable_devices("paper:1")
    paper.devices = 2
    assert usable_devices("paper:1").devices == [torch.device("paper:1")]
    assert paper.current_device() == 1


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products on paper are the CPU's."""
    for dimension in ("_TOKENS", "_COLUMNS", "_ROWS"):
        monkeypatch.setattr(bandwidth, dimension, 8)
    monkeypatch.setattr(gpu_speed, "_MATRIX_BYTES", 10**6)
    monkeypatch.setattr(gpu_speed, "_CODES_BYTES", 10**6)


def test_planning_and_the_bench_look_at_a_gpu_and_measure_it(paper, case, tmp_path, small_products):
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    (there,) = Machine.now(tmp_path, [device]).gpus
    assert (there.name, there.memory) == ("GPU on paper", 4 * 10**9)
    assert "paper:0: GPU on paper" in measurement_key(blueprint, tmp_path, device)
    measured = measure_gpu(device)
    assert (measured.name, measured.source) == ("GPU on paper", "measured")
    assert min(measured.memory, measured.bus, measured.compute, measured.lanes) > 0
    assert min(measured.kernel, measured.round_trip) > 0
    limits = LimitsMeter(device, blueprint).measure()
    assert min(limits.memory, limits.gemm) > 0


def test_a_gpu_is_measured_beside_a_model_that_fills_it(paper, case, tmp_path):
    """The bench took 1.15 GB after the slots had taken all but one."""
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    memory = paper.memory(device)
    memory.total = memory.taken + 100_000_000
    most, allocate = [memory.taken], paper.allocated

    def watch(tensor, device):
        allocate(tensor, device)
        most.append(memory.taken)

    paper.allocated = watch
    measured = measure_gpu(device)
    limits = LimitsMeter(device, blueprint)
    assert min(limits.measure().memory, measured.memory) > 0
    assert max(most) - most[0] < 50_000_000


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))


def test_a_gpu_is_measured_at_the_first_load_and_its_speeds_are_kept(
    paper, case, monkeypatch, home
):
    """Until somebody planned, the data sheet decided if the GPU computes."""
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    measured: list[torch.device] = []
    usual = measuring.measure_gpu

    def measure(card):
        measured.append(card)
        return replace(usual(card), kernel=1e-6 * (5 + len(measured)))

    monkeypatch.setattr(measuring, "measure_gpu", measure)
    for _ in range(2):
        (speeds,) = estimated_speeds(blueprint, [device]).gpus
        assert (speeds.kernel, speeds.source) == (6e-6, "measured")
    assert measured == [device]


def test_a_gpu_that_cannot_be_measured_has_the_speeds_of_its_data_sheet(
    paper, case, monkeypatch, home
):
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint

    def measure(card):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measuring, "measure_gpu", measure)
    (speeds,) = estimated_speeds(blueprint, [device]).gpus
    assert speeds.source == "a cheap card"
