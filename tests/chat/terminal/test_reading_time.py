"""The time that a prompt takes: as predicted at first, then by the session's own pace."""

import pytest
from chat_doubles import Stats

from mixchat.chat.terminal.active_chat import ReadingTime


def test_before_anything_was_read_it_is_what_is_predicted_for_the_turn() -> None:
    asked = []
    reading = ReadingTime(lambda tokens, first: asked.append((tokens, first)) or 7.0)
    assert reading.seconds(3200) == 7.0
    reading.note(Stats(prompt_tokens=90, reused_tokens=80, prefill_seconds=9.0))  # too short
    assert reading.seconds(100) == 7.0
    assert asked == [(3200, True), (100, False)]


def test_after_a_long_prompt_it_is_at_the_pace_of_that() -> None:
    reading = ReadingTime(lambda tokens, first: None)
    assert reading.seconds(3200) is None
    reading.note(Stats(prompt_tokens=500, reused_tokens=400, prefill_seconds=2.0))
    assert reading.seconds(3200) == pytest.approx(64.0)
