"""GPUs on paper refuse what CUDA refuses."""

import contextlib
import threading
from pathlib import Path

import paper_gpu
import pytest
import torch
from paper_allocator import MB, Allocator
from paper_runtime import GB, PaperRuntime

from mixchat.base import gpu
from mixchat.kernels.cpu.rows import Swiglu
from mixchat.kernels.gpu.experts import experts_down
from mixchat.kernels.gpu.norm import add_norm
from mixchat.weights.format.expert import ExpertSpec
from mixchat.weights.format.gpu_expert import expert_form
from mixchat.weights.matrix.linear import LinearSpec

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
    numbers, event = torch.ones(4, device=DEVICE), paper.Event()
    target = gpu.locked_block(16, DEVICE).view(torch.float32)
    target.copy_(numbers, non_blocking=True)
    event.record()
    assert target.tolist() == [0] * 4
    event.synchronize()
    assert target.tolist() == [1] * 4


def test_a_capture_takes_copies_of_ram_if_its_storage_begins_with_what_is_locked(paper):
    """torch asks about the storage's first byte. A block began up to 4,032 bytes after it."""
    numbers, block = torch.zeros(4, device=DEVICE), torch.zeros(256, dtype=torch.uint8)
    behind = block[64:]
    paper.cudaHostRegister(behind.data_ptr(), behind.nbytes, 0)
    assert paper.is_locked(behind)
    with (
        pytest.raises(RuntimeError, match="storage begins before what is locked"),
        gpu.captured(DEVICE),
    ):
        numbers.copy_(behind[:16].view(torch.float32), non_blocking=True)
    paper.cudaHostUnregister(behind.data_ptr())


def test_graphs_copy_to_any_part_of_a_locked_block(paper):
    block = gpu.locked_block(2 * 4096, DEVICE)
    parts = [piece.view(torch.float32) for piece in torch.split(block, [64, 4032, 4096])]
    numbers = torch.arange(16, dtype=torch.float32, device=DEVICE)
    assert block.data_ptr() % 4096 == 0
    with gpu.captured(DEVICE) as graph:
        for part in parts:
            part[-16:].copy_(numbers, non_blocking=True)
    graph.replay()
    paper.synchronize()
    assert all(part[-16:].tolist() == list(range(16)) for part in parts)


def test_locked_pages_are_unlocked_before_they_go_back_to_the_system(paper, monkeypatch):
    """Another block may come to lie at the address as soon as they are given back."""
    mapped = []

    def are_there(address: int) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = (line.split()[0].split("-") for line in lines)
        return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)

    def unregister(address: int) -> int:
        mapped.append(are_there(address))
        return PaperRuntime.cudaHostUnregister(paper, address)

    monkeypatch.setattr(paper, "cudaHostUnregister", unregister)
    before = dict(paper.locked)
    block = gpu.locked_block(1 << 20, DEVICE)
    address, view = block.data_ptr(), block[4096:].view(torch.float32)
    del block
    assert address in paper.locked
    assert view.sum() == 0
    del view
    assert mapped == [True]
    assert paper.locked == before


def test_ram_that_the_system_does_not_lock_is_refused_once(paper):
    """CUDA tells of the refusal again at the next kernel, which another caller would get."""
    paper.refuses_locks = True
    with pytest.raises(gpu.PageLockError):
        gpu.locked_block(4096, DEVICE)
    assert (torch.ones(4, device=DEVICE) + 1).cpu().tolist() == [2] * 4


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2),
        ([1 / 4] * 8, 2),  # MB: a small tensor takes a part of 2 MB
        ([2.5] * 8, 20),
        ([2.4] * 9, 40),
        ([5.6] * 4, 40),  # experts of LFM2: three in 20 MB
        ([10], 10),
        ([13.25, 0.5], 16),
    ],
)
def test_tensors_take_what_torch_s_allocator_takes(sizes, reserved):
    allocator = Allocator()
    blocks = [allocator.take(int(size * MB), GB) for size in sizes]
    assert allocator.reserved == reserved * MB
    for block in blocks:
        allocator.free(block)
    assert allocator.reserved == reserved * MB
    assert [allocator.take(int(size * MB), reserved * MB) for size in sizes].count(None) == 0
    assert allocator.reserved == reserved * MB
    allocator.empty()
    assert allocator.reserved == reserved * MB


def test_memory_that_is_kept_goes_back_before_an_allocation_fails(paper):
    paper.empty_cache()
    memory = paper.memory(DEVICE)
    memory.total = memory.allocator.reserved + 64 * MB
    kept = torch.empty(40 * MB, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(40 * MB, dtype=torch.uint8, device=DEVICE)
    del kept
    assert len(torch.empty(60 * MB, dtype=torch.uint8, device=DEVICE)) == 60 * MB
    assert paper.mem_get_info(DEVICE)[0] == 4 * MB
    paper.empty_cache()
    assert paper.mem_get_info(DEVICE)[0] == 64 * MB


def test_a_graph_takes_in_no_work_of_another_thread(paper):
    """torch has 32 streams, of which the thread that moves experts has one. Captures took all."""
    number, moved = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    stream, has_begun, may_end = paper.Stream(DEVICE), threading.Event(), threading.Event()
    paper.synchronize()

    def move() -> None:
        with paper.stream(stream):
            moved.add_(1)
            has_begun.set()
            may_end.wait()

    mover = threading.Thread(target=move)
    mover.start()
    has_begun.wait()
    try:
        for _ in range(40):
            with gpu.captured(DEVICE):
                number.add_(1)
    finally:
        may_end.set()
        mover.join()


def test_streams_may_use_the_pieces_of_a_block_that_was_split_at_once(paper):
    first, second = torch.split(torch.zeros(8, dtype=torch.uint8, device=DEVICE), 4)
    side, event = paper.Stream(DEVICE), paper.Event()
    event.record()
    event.wait(side)
    first.add_(1)
    with paper.stream(side):
        second.add_(2)
        with pytest.raises(RuntimeError, match="did not wait for it"):
            first.add_(2)


def normalize(device: torch.device, weights: int = 16) -> None:
    """Start a kernel with a norm of so many weights."""
    x, normed = (torch.zeros(16, device=device) for _ in range(2))
    none, weight = torch.zeros(0, 16, device=device), torch.zeros(weights, device=device)
    add_norm(x, none, weight, normed, 1e-5, torch.zeros(1, dtype=torch.int32, device=device))


def test_a_kernel_starts_on_the_current_gpu_and_not_on_that_of_its_tensors(paper, monkeypatch):
    """CUDA takes the current one. A launch that did not choose it passed here."""
    normalize(torch.device("paper", 1))
    monkeypatch.setattr(gpu, "current", lambda device: contextlib.nullcontext())
    normalize(DEVICE)
    with pytest.raises(RuntimeError, match="device 0 is current"):
        normalize(torch.device("paper", 1))


def test_a_kernel_touches_no_memory_but_that_of_tensors(paper):
    paper.interprets = True
    normalize(DEVICE)
    with pytest.raises(Exception, match="leaves the memory"):
        normalize(DEVICE, weights=8)


@pytest.mark.parametrize("interprets", [False, True])
def test_an_address_that_is_taken_for_a_multiple_of_16_is_one(paper, interprets):
    paper.interprets = interprets
    up, down = (LinearSpec("m", rows, 64, "nf4", torch.bfloat16) for rows in (128, 64))
    spec = ExpertSpec(up, down, Swiglu())
    block = torch.zeros(spec.stride + 16, dtype=torch.uint8, device=DEVICE)
    gated = torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    selected, weights = torch.zeros(1, dtype=torch.int32, device=DEVICE), gated[0, :1].float()
    form, levels = expert_form(spec, DEVICE)

    def run(offset: int) -> None:
        table = torch.tensor([block.data_ptr() + offset], device=DEVICE)
        experts_down(gated, selected, weights, table, form, levels)

    run(0)
    with pytest.raises(Exception, match=r"misaligned|multiple of 16"):
        run(8)


def test_a_capture_refuses_a_kernel_that_ran_with_other_alignment(paper):
    """Triton compiles another one then, which a capture cannot load."""
    numbers, finished = torch.zeros(68, device=DEVICE), torch.zeros(1, dtype=torch.int32)
    none, weight = torch.zeros(0, 64, device=DEVICE), torch.zeros(64, device=DEVICE)
    finished = finished.to(DEVICE)
    add_norm(numbers[4:], none, weight, numbers[4:], 1e-5, finished)
    with gpu.captured(DEVICE):
        add_norm(numbers[:64], none, weight, numbers[:64], 1e-5, finished)
    with pytest.raises(RuntimeError, match="loaded in a capture"), gpu.captured(DEVICE):
        add_norm(numbers[1:65], none, weight, numbers[1:65], 1e-5, finished)
