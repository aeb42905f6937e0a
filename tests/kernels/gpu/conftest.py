"""Kernels for GPUs run in Triton's interpreter, or on the card that MIXCHAT_TEST_GPU names."""

import pytest
import torch
from gpu_tools import CARD, start_on_card
from triton_interpreter import compute_bf16

from mixchat.base import gpu
from mixchat.kernels.gpu import launch

compute_bf16()


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    if CARD is not None:
        has_bf16 = gpu.has_bf16(torch.device(CARD))
        monkeypatch.setattr(gpu, "has_bf16", lambda device: has_bf16)
        monkeypatch.setattr(launch, "start", start_on_card)
