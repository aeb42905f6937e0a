"""Programs: each thread gets through, and what needs an earlier step finds it done."""

from collections.abc import Iterator

import pytest
import torch

from mixchat.kernels.cpu import rows, threads
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.program import Program, Step, alone, together

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")

COLUMNS = 4096


@pytest.fixture(params=[1, 2, 5])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "a pool"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a pool":
        monkeypatch.setattr(threads, "_library", lambda: None)
    elif threads.team_size_function() is None:
        pytest.skip("no OpenMP library is loaded")


def add(x: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> Step:
    return rows.Addition().step(x, other, out)


def zeros(count: int = 1) -> torch.Tensor:
    return torch.zeros(count, COLUMNS)


@pytest.mark.usefixtures("_threads", "_way")
def test_each_step_is_run_once_in_each_run_and_finds_the_stage_before_it_done() -> None:
    one, numbers = torch.ones(64, COLUMNS), [zeros(64) for _ in range(4)]
    doubled = [zeros(64), zeros(64)]
    program = Program(
        [
            alone(add(numbers[0], one, numbers[0]), add(numbers[0], one, numbers[0])),
            together(add(numbers[0], numbers[0], doubled[0]), add(numbers[0], one, doubled[1])),
            together(add(doubled[0], doubled[1], numbers[1])),
            alone(add(numbers[1], one, numbers[2])),
            together(add(numbers[2], one, numbers[3])),
        ]
    )
    for turn in range(1, 200):
        program.run()
        assert (numbers[3] == 3 * (2 * turn) + 3).all(), turn


@pytest.mark.usefixtures("_threads", "_way")
def test_the_steps_of_stages_alone_run_one_by_one() -> None:
    """Each has one item of work: were they shared, a thread would begin one before its time."""
    total, one = zeros(), torch.ones(1, COLUMNS)
    doubling = [add(total, total, total) for _ in range(12)]
    some, others = doubling[:5], doubling[5:]
    stages = [together(add(one, one, zeros())), alone(add(total, one, total), *some)]
    program = Program([*stages, alone(*others)])
    for turn in range(50):
        total.zero_()
        program.run()
        assert (total == 2**12).all(), turn


@pytest.mark.usefixtures("_threads")
def test_an_argument_can_be_changed_between_two_runs() -> None:
    one, two, out = torch.ones(1, COLUMNS), 2 * torch.ones(1, COLUMNS), zeros()
    step = add(one, one, out)
    program = Program([together(step)])
    program.run()
    step.set(x=two.data_ptr())
    program.run()
    assert (out == 3).all()


def test_a_step_alone_can_be_run_again() -> None:
    total, one = zeros(), torch.ones(1, COLUMNS)
    step = add(total, one, total)
    step.run()
    step.run()
    assert (total == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    x, other = (torch.randn(3, 160).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    rows.Addition().step(x, other, out).run()
    assert torch.equal(out, x + other)
