import pytest
import torch

from mixchat.kernels.cpu.arrange import Slots, arrange_step
from mixchat.kernels.cpu.compile import kernels_available

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")

SLOTS, EXPERTS = 6, 9


def arranged(experts: list[int], rows: list[int], most: int) -> tuple[list[list[int]], ...]:
    """Return the slots' arguments, the rows expert by expert, and the pairs' places.

    An expert e has 100 + e and 200 + e. The rows give 1,000 plus 10 for each place before them, and
    their count.
    """
    filled = torch.full((SLOTS, 4), -1)
    targets = filled.data_ptr() + 8 * torch.arange(filled.numel()).view(filled.shape)
    table = torch.arange(EXPERTS)[:, None] + torch.tensor([100, 200])
    slots = Slots(targets, torch.tensor([[1_000, 10, 0], [0, 0, 1]]))
    pairs, order = torch.full((2, most), EXPERTS - 1), torch.full((2, most), -1)
    step = arrange_step(pairs[0], pairs[1], table, slots, order)
    for numbers in (experts[::-1], experts):  # it can run again and again
        pairs[:, : len(rows)] = torch.tensor([numbers, rows])
        step.set(pairs=len(rows))
        step.run()
    return filled.tolist(), *order[:, : len(rows)].tolist()


def test_pairs_are_ordered_by_expert_and_keep_their_order_within_one():
    filled, x_rows, places = arranged([7, 2, 7, 0, 2, 7], [0, 0, 1, 1, 2, 3], 6)
    assert filled[:3] == [[100, 200, 1_000, 1], [102, 202, 1_010, 2], [107, 207, 1_030, 3]]
    assert x_rows == [1, 0, 2, 0, 1, 3]
    assert places == [3, 1, 4, 0, 2, 5]


def test_slots_that_are_left_have_no_rows():
    filled, x_rows, places = arranged([4, 4], [5, 3], 6)
    assert filled[0] == [104, 204, 1_000, 2]
    assert [slot[3] for slot in filled] == [2, 0, 0, 0, 0, 0]
    assert (x_rows, places) == ([5, 3], [0, 1])


def test_as_many_experts_as_slots_fill_them_all():
    experts = [8, 0, 3, 5, 1, 2]
    filled, _, places = arranged(experts, [0] * 6, 6)
    assert filled == [[100 + e, 200 + e, 1_000 + 10 * n, 1] for n, e in enumerate(sorted(experts))]
    assert places == [sorted(experts).index(expert) for expert in experts]
