"""The rule by which an answer ends at a token."""

import pytest

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer_request import AnswerRequest


@pytest.mark.parametrize("at_max", ["length", "context"])
def test_an_answer_ends_at_a_stop_token_or_at_its_last(at_max):
    request = AnswerRequest([5], SamplingOptions(), frozenset({2, 7}), 3, at_max=at_max)
    assert [request.end_after(tokens, 4) for tokens in (1, 2, 3)] == [None, None, at_max]
    assert [request.end_after(3, stop) for stop in (2, 7)] == ["stop"] * 2
