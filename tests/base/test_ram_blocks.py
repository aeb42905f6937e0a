"""Blocks of RAM: apart from each other, and given back one by one."""

import psutil
import pytest
import torch

from mixchat.base.ram_blocks import BLOCK_ALIGNMENT, new_block

SIZE = 2_506_752  # bytes of an expert of Qwen3, a large page and a part of one
COUNT = 64


def touched(value: int) -> torch.Tensor:
    block = new_block(SIZE)
    block.fill_(value)
    return block


def test_blocks_begin_at_pages_and_share_no_byte():
    blocks = [touched(number) for number in range(COUNT)]
    del blocks[::3]
    blocks += [touched(100 + number) for number in range(COUNT)]
    assert all(block.data_ptr() % BLOCK_ALIGNMENT == 0 for block in blocks)
    assert all(len(block) == SIZE and len(block.unique()) == 1 for block in blocks)


def test_a_block_in_an_inference_can_be_filled_outside_of_it():
    with torch.inference_mode():
        block = new_block(SIZE)
    block.fill_(1)
    assert not block.is_inference()


@pytest.mark.parametrize("large", [True, False], ids=["large pages", "none, as on macOS"])
def test_the_memory_of_each_block_that_is_dropped_goes_back(monkeypatch, large):
    monkeypatch.setattr("mixchat.base.system.has_large_pages", lambda: large)
    blocks = [touched(1) for _ in range(COUNT)]
    process = psutil.Process()
    before = process.memory_info().rss
    del blocks[::2]
    freed = before - process.memory_info().rss
    assert freed == pytest.approx(COUNT // 2 * SIZE, rel=0.1)
    assert all(bool(block.min()) for block in blocks)


def test_a_view_keeps_the_memory_of_its_block():
    view = touched(7)[5:9]
    others = [touched(1) for _ in range(3)]
    assert view.tolist() == [7] * 4
    assert len(others) == 3
