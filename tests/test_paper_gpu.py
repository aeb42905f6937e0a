"""GPUs on paper refuse what CUDA refuses."""

import paper_gpu
import pytest
import torch

from mixchat.base import gpu

DEVICE = torch.device("paper", 0)


@pytest.fixture
def paper():
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


def test_an_event_of_one_gpu_is_not_recorded_on_the_stream_of_another(paper):
    """As on CUDA: what the double is strict about."""
    first, second = (paper.current_stream(torch.device("paper", number)) for number in (0, 1))
    assert first is not second
    event = paper.Event()
    event.record(first)
    event.wait(second)
    with pytest.raises(RuntimeError, match="one device"):
        event.record(second)
    with paper.stream(paper.Stream(torch.device("paper", 1))):
        assert paper.current_device() == 1
        assert paper.current_stream(torch.device("paper", 0)) is first
        assert paper.current_stream() is not second
    assert paper.current_device() == 0
    assert paper.current_stream(torch.device("paper", 1)) is second


def test_a_graph_starts_what_was_captured_each_time_it_is_replayed(paper):
    number = torch.zeros(4, device=DEVICE)
    with gpu.captured(DEVICE) as graph:
        number.add_(1)
    assert number.cpu().tolist() == [0] * 4
    graph.replay()
    graph.replay()
    assert number.cpu().tolist() == [2] * 4


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda numbers: numbers.cpu(), "a wait"),
        (lambda numbers: numbers.sum().item(), "memory"),
        (lambda numbers: numbers + 1, "memory"),
        (lambda numbers: numbers[numbers > 0], "memory"),
        (lambda numbers: numbers.copy_(torch.ones(4)), "a wait"),
        (lambda numbers: numbers.copy_(torch.ones(4), non_blocking=True), "not locked"),
    ],
)
def test_a_capture_refuses_what_cuda_refuses(paper, work, what):
    numbers = torch.zeros(4, device=DEVICE)
    with (
        pytest.raises(RuntimeError, match=f"not permitted in a capture: .*{what}"),
        gpu.captured(DEVICE),
    ):
        work(numbers)


def test_work_on_what_another_stream_writes_has_to_wait_for_it(paper):
    numbers = torch.zeros(4, device=DEVICE)
    side, event = paper.Stream(DEVICE), paper.Event()
    event.record()
    with paper.stream(side):
        with pytest.raises(RuntimeError, match="did not wait for it"):
            numbers.add_(1)
        event.wait(side)
        numbers.add_(1)
    with pytest.raises(RuntimeError, match="did not wait for it"):
        numbers.add_(1)


def test_a_copy_to_locked_ram_arrives_when_the_host_waits_for_it(paper):
    numbers, target, event = torch.ones(4, device=DEVICE), torch.zeros(4), paper.Event()
    gpu.page_lock(target, DEVICE)
    target.copy_(numbers, non_blocking=True)
    event.record()
    assert target.tolist() == [0] * 4
    event.synchronize()
    assert target.tolist() == [1] * 4
