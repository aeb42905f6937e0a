"""A layer's works are gathered into stages, whatever their order allows."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mixchat.engine.layers.operations import Rows
from mixchat.engine.layers.program import Work, span, staged

SPANS = st.lists(
    st.builds(lambda name, start, size: (name, start, start + size), *[st.integers(0, 3)] * 3),
    max_size=2,
)


@st.composite
def descriptions(draw: Any) -> list[Work]:
    """Return works whose only step is their number."""
    return [
        Work([number], draw(SPANS), draw(SPANS), draw(st.booleans()), draw(st.booleans()))  # type: ignore[list-item]
        for number in range(draw(st.integers(1, 9)))
    ]


@given(descriptions(), st.sampled_from([1, 3]))
def test_no_work_comes_before_what_it_waits_for(works, sequences):
    stages = staged(works, sequences)
    place = {step: at for at, stage in enumerate(stages) for step in stage.steps}
    assert sorted(place) == list(range(len(works)))
    for later, work in enumerate(works):
        for earlier in range(later):
            if works[earlier].precedes(work):
                first, second = place[earlier], place[later]
                steps = list(stages[first].steps)
                assert first < second or steps.index(earlier) < steps.index(later)
                assert first < second or stages[first].alone
    for work in range(len(works)):
        if works[work].is_serial:
            assert stages[place[work]].alone


def test_a_dense_part_is_computed_beside_the_experts():
    """Two chains that meet at their end have as many stages as the longer one."""
    wide = [Work([n], [("a", 0, 1)], [("a", 0, 1)], is_wide=True) for n in range(4)]  # type: ignore[list-item]
    other = [Work([n], [("b", 0, 1)], [("b", 0, 1)], is_wide=True) for n in range(4, 6)]  # type: ignore[list-item]
    end = Work([6], [("a", 0, 1), ("b", 0, 1)], [("c", 0, 1)])  # type: ignore[list-item]
    stages = staged([*other, *wide, end], sequences=1)
    assert [list(stage.steps) for stage in stages] == [[0], [1], [4, 2], [5, 3], [6]]
    assert [stage.alone for stage in stages] == [False] * 4 + [True]


def test_rows_name_their_numbers_in_a_buffer():
    heads = Rows.new("qkv", 3, 4)
    assert span(heads) == ("qkv", 0, 12)
    assert span(heads[1:]) == ("qkv", 4, 12)
    assert span(heads.columns(slice(1, 3))[2:]) == ("qkv", 9, 11)
