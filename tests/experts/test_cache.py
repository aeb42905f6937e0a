from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.cache import ExpertKey, LRUCache

A, B, C = ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)


def test_the_docstrings_example() -> None:
    cache = LRUCache(2)
    assert cache.lookup(A) is None
    assert cache.admit(A) == 0
    assert cache.lookup(B) is None
    assert cache.admit(B) == 1
    assert cache.lookup(A) == 0
    assert cache.lookup(C) is None
    assert cache.admit(C) == 1
    assert B not in cache
    cache.discard(C)
    assert cache.admit(B) == 1
    assert len(cache) == 2


keys = st.builds(ExpertKey, st.integers(0, 3), st.integers(0, 3))


@given(st.integers(1, 6), st.lists(st.tuples(keys, st.integers(0, 9)), max_size=80))
def test_it_does_what_a_naive_list_does(slots: int, uses: list[tuple[ExpertKey, int]]) -> None:
    """The naive model: a list of keys, most recent last, cut to the size of the cache."""
    cache, recent, where = LRUCache(slots), [], {}
    for key, luck in uses:
        slot = cache.lookup(key)
        assert (slot is not None) == (key in recent)
        if slot is None:
            slot = cache.admit(key)
            if luck == 0:  # the bytes did not arrive
                cache.discard(key)
                recent = recent[1:] if len(recent) == slots else recent
                continue
        else:
            assert slot == where[key]
        recent = [*(k for k in recent if k != key), key][-slots:]
        where[key] = slot
        assert [k in cache for k in where] == [k in recent for k in where]
        assert len(cache) == len(recent)
        # No two experts in one slot.
        assert len({where[k] for k in recent}) == len(recent)
        assert 0 <= slot < slots
