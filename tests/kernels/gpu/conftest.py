"""Kernels for GPUs run in Triton's interpreter, or on the card that MIXCHAT_TEST_GPU names."""

import pytest
import torch
from gpu_tools import CARD, start_confined, start_on_card
from triton_interpreter import compute_as_gpus

from mixchat.base import gpu
from mixchat.kernels.gpu import launch

compute_as_gpus()


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    if CARD is None:
        monkeypatch.setattr(launch, "start", start_confined)
    else:
        has_bf16 = gpu.has_bf16(torch.device(CARD))
        monkeypatch.setattr(gpu, "has_bf16", lambda device: has_bf16)
        monkeypatch.setattr(launch, "start", start_on_card)
