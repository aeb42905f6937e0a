"""Stop strings: found wherever the stream is cut, never shown, and no other text is held back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.text.detokenizer import StopStrings

abc = st.text("ab\n", max_size=12)


def shown(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    text, stopped = "", False
    for chunk in chunks:
        piece, stopped = stop.add(chunk)
        text += piece
        if stopped:
            break
    return text + stop.flush(), stopped


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """Return the text before the stop string that ends first, the longest one that ends there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if s and text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(deadline=None, max_examples=500)
@given(stops=st.lists(st.text("ab\n", max_size=4), max_size=3), chunks=st.lists(abc, max_size=6))
def test_the_cut_of_the_stream_makes_no_difference(stops: list[str], chunks: list[str]) -> None:
    assert shown(stops, chunks) == reference(stops, "".join(chunks))


@settings(deadline=None, max_examples=300)
@given(stops=st.lists(st.text("ab\n", max_size=4), max_size=3), chunks=st.lists(abc, max_size=6))
def test_only_what_may_begin_a_stop_string_is_held_back(
    stops: list[str], chunks: list[str]
) -> None:
    stop = StopStrings(stops)
    came, out = "", ""
    for chunk in chunks:
        piece, stopped = stop.add(chunk)
        came, out = came + chunk, out + piece
        if stopped:
            return
        held = came[len(out) :]
        assert came == out + held
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_an_example() -> None:
    stop = StopStrings(["END"])
    assert stop.add("the E") == ("the ", False)
    assert stop.add("N") == ("", False)
    assert stop.add("Dx") == ("", True)
    assert stop.add("more") == ("", True)
    assert stop.flush() == ""


def test_the_one_that_ends_first_counts_even_in_one_chunk() -> None:
    assert shown(["b", "abc"], ["abc"]) == shown(["b", "abc"], ["a", "b", "c"]) == ("a", True)
    assert shown(["b", "ab"], ["ab"]) == shown(["b", "ab"], ["a", "b"]) == ("", True)


def test_text_that_is_not_a_stop_string_after_all_is_shown() -> None:
    stop = StopStrings(["\nUser:"])
    assert stop.add("a\nUs") == ("a", False)
    assert stop.add("a") == ("\nUsa", False)
    assert stop.add("\n") == ("", False)
    assert stop.flush() == "\n"
    assert stop.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    stop = StopStrings(["", ""])
    assert stop.add("anything") == ("anything", False)
    assert stop.flush() == ""
