"""The rule by which an answer ends at a token."""

import pytest

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer import TokenAnswer


@pytest.mark.parametrize("at_max", ["length", "context"])
def test_an_answer_ends_at_a_stop_token_or_at_its_last(at_max):
    def end_of(*tokens):
        answer = TokenAnswer([2], SamplingOptions(), frozenset({2, 7}), 3, at_max=at_max)
        answer.ids += tokens
        answer.stats.generated_tokens = len(tokens)
        assert answer.has_ended == (answer.end is not None)
        return answer.end

    assert [end_of(*[4] * tokens) for tokens in range(4)] == [None, None, None, at_max]
    assert [end_of(4, 4, stop) for stop in (2, 7)] == ["stop"] * 2
