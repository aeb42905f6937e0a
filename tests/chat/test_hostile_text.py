"""A few rounds of what `tests/campaigns/chat.py` does at full size."""

import importlib.util
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "campaigns" / "chat.py"


def test_no_control_sequence_reaches_the_terminal_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLORTERM", "")
    spec = importlib.util.spec_from_file_location("chat_campaign", CAMPAIGN)
    assert spec is not None
    assert spec.loader is not None
    campaign = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(campaign)
    assert campaign.payloads(60) == []
    monkeypatch.setattr("mixchat.chat.terminal.screen.sanitize", str)
    assert campaign.payloads(60) != []  # it would see them
