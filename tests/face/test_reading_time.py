"""The time to read a prompt is the pace of this session, or else what is predicted."""

from types import SimpleNamespace

import pytest

from mixchat.engine.stats import GenerationStats
from mixchat.face.reading_time import ReadingTime


def predicted(speed, asked=None):
    """A prediction of `speed` tok/s."""

    def prompt(tokens, *, cold):
        if asked is not None:
            asked.append(cold)
        return SimpleNamespace(seconds=tokens / speed)

    return lambda: SimpleNamespace(prompt=prompt)


def test_before_anything_was_read_it_is_what_is_predicted_for_the_turn():
    asked = []
    reading = ReadingTime(predicted(100.0, asked))
    assert reading.seconds(3200) == 32.0
    reading.note(GenerationStats(prompt_tokens=90, reused_tokens=80, prefill_seconds=9.0))
    assert reading.seconds(100) == 1.0  # ten tokens say nothing about longer prompts
    assert asked == [True, False]


def test_after_a_long_prompt_it_is_at_the_pace_of_that():
    reading = ReadingTime()
    assert reading.seconds(3200) is None
    reading.note(GenerationStats(prompt_tokens=500, reused_tokens=400, prefill_seconds=2.0))
    assert reading.seconds(3200) == pytest.approx(64.0)


@pytest.mark.parametrize(("slots", "filling"), [(32, False), (16, False), (32, True)])
def test_experts_that_all_fit_come_before_anyone_asks(slots, filling):
    asked = []
    experts = SimpleNamespace(slots=slots, is_filling=filling)
    engine = SimpleNamespace(experts=experts, blueprint=SimpleNamespace(expert_count=32))
    ReadingTime(predicted(100.0, asked), engine).seconds(10)
    assert asked == [slots < 32 or filling]
