"""The tokens that are proposed, and when that pays."""

import pytest
from engine_tools import Always
from hypothesis import given
from hypothesis import strategies as st

from mixchat.engine.speculation import Proposals, Speculation


def proposals(speculation: Speculation | None = None) -> Proposals:
    return Proposals(speculation or Always(), {2})


def test_what_followed_the_last_tokens_is_proposed_as_many_as_stood_there():
    counted = list(range(10, 40))
    assert proposals().propose([*counted, *counted[:8]], 99) == counted[8:16]
    assert proposals().propose([*counted, *counted[:11]], 99) == counted[11:22]
    assert proposals().propose([*counted, *counted[:11]], 3) == counted[11:14]
    assert proposals().propose([*counted, *counted[:7]], 99) == []
    long = list(range(200))
    assert proposals().propose([*long, *long[:60]], 99) == long[60:108]


def test_what_repeats_itself_is_proposed_again_and_again():
    assert proposals().propose([3, *(3 * [5, 6, 7, 8]), 5], 99) == [*(2 * [6, 7, 8, 5]), 6]
    assert proposals().propose(30 * [5], 20) == 20 * [5]


def test_the_last_place_counts_and_nothing_is_proposed_from_a_stop_token_on():
    start = [5, 6, 7, 8, 9, 10, 11, 12]
    twice = [*start, 21, 22, *start, 23, 24, 2, 25, *start]
    assert proposals().propose(twice, 99) == [23, 24]


def test_an_answer_is_searched_as_it_grows():
    tried, ids = proposals(), list(range(11, 20))
    for token in range(11, 19):
        assert tried.propose(ids, 99) == []
        ids.append(token)
    assert tried.propose(ids, 99) == [19, *range(11, 18)]


@given(st.lists(st.sampled_from([0, 1, 256, 257, 65536]), min_size=9, max_size=200))
def test_the_search_finds_whole_tokens(ids):
    """Tokens are searched as bytes: those of 256 lie across two tokens 1, and so on."""
    last = ids[-8:]
    ends = [end for end in range(8, len(ids)) if ids[end - 8 : end] == last]
    found = Proposals(Always(), set()).propose(ids, 1)
    assert found == [ids[end] for end in ends[-1:]]


def decode(speculation: Speculation, tokens: int, cost: float, right: int) -> float:
    """Return the seconds of so many tokens, where there is always something to propose.

    A token takes a second, a pass that verifies `cost` seconds; of its tokens `right` are right.
    """
    seconds, made = 0.0, 0
    while made < tokens:
        verifies = speculation.pays
        seconds += cost if verifies else 1.0
        made += 1 + right if verifies else 1
        if verifies:
            speculation.add_verifying(cost)
            for _ in range(right):
                speculation.add_accepted()
        else:
            speculation.add_single(1.0)
    return seconds


@pytest.mark.parametrize("cost", [1.1, 1.5, 3.0, 8.0])
def test_proposals_that_are_wrong_cost_three_percent_at_most(cost):
    assert decode(Speculation(), 2000, cost, right=0) <= 2000 * 1.03


def test_proposals_that_are_right_pay_at_once():
    assert decode(Speculation(), 2000, cost=3.0, right=11) < 2000 * 0.27


def test_it_is_taken_up_again_where_text_begins_to_repeat():
    speculation = Speculation()
    decode(speculation, 2000, cost=3.0, right=0)
    assert decode(speculation, 2000, cost=3.0, right=11) < 2000 * 0.35


def test_what_the_pass_behind_takes_longer_is_its_loss():
    """It brings experts back that the verified tokens drove out."""
    speculation = Speculation()
    speculation.add_single(1.0)
    speculation.add_verifying(2.0)
    speculation.add_accepted()
    assert speculation.pays
    speculation.add_single(6.0)
    assert speculation.single_seconds == 1.0
    assert not speculation.pays
