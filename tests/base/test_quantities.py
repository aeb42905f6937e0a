import pytest

from mixchat.base.errors import UsageError
from mixchat.base.quantities import (
    MemoryBudget,
    format_age,
    format_least,
    format_rate,
    format_size,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), (" 10m ", 600), ("1.5 H", 5400), ("0.5s", 0.5)]
)
def test_a_time_in_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0m", "-1m", "1e3s"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="as a time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("300MB", 300_000_000), ("1.5GiB", 3 * 2**29), ("12345", 12345), ("0", 0), (" 7 kB ", 7000)],
)
def test_a_budget_in_bytes(text, size):
    assert MemoryBudget.parse(text).of(10**12) == size


def test_a_budget_as_a_percentage():
    assert MemoryBudget.parse("50%").of(1000) == 500
    assert MemoryBudget.parse("100 %").of(1000) == 1000


@pytest.mark.parametrize("text", ["", "9" * 400, "-3MB", "1e3", "300MiBB", "0%", "101%", "٣MB"])
def test_a_malformed_budget_is_refused(text):
    with pytest.raises(UsageError):
        MemoryBudget.parse(text)


def test_budgets_have_commas_between_them():
    assert MemoryBudget.parse_list("12GB, 50%") == (
        MemoryBudget(size=12 * 10**9),
        MemoryBudget(fraction=0.5),
    )
    assert MemoryBudget.parse_list("8GB") == (MemoryBudget(size=8 * 10**9),)
    for text in ("8GB,", "", "8GB;9GB"):
        with pytest.raises(UsageError):
            MemoryBudget.parse_list(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1000, "1 kB"),
        (93_585_408, "93.6 MB"),
        (93_405_585_408, "93.4 GB"),
    ],
)
def test_sizes_are_written_with_three_digits(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 999, 1001, 24_576, 187_170_816, 10**9, 4_199_999_999])
def test_a_minimum_is_rounded_up(size):
    shown = MemoryBudget.parse(format_least(size).replace("bytes", "B")).of(0)
    assert size <= shown <= 1.1 * size


@pytest.mark.parametrize(
    ("rate", "text"), [(0.6174, "0.62"), (1.04, "1"), (9.4, "9.4"), (12.6, "13"), (1234.0, "1234")]
)
def test_rates_have_two_digits(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5.0, "now"),
        (61.0, "1 minute ago"),
        (7300.0, "2 hours ago"),
        (400 * 86400.0, "400 days ago"),
    ],
)
def test_an_age_has_one_unit(seconds, text):
    assert format_age(seconds) == text


@pytest.mark.parametrize("text", ["8", " 16 ", "1.5", "9999"])
def test_a_bare_number_that_means_gigabytes_is_refused(text):
    """`--host-memory 8` was taken for 8 bytes."""
    with pytest.raises(UsageError, match="bytes") as refused:
        MemoryBudget.parse(text)
    assert refused.value.hint == f"Did you mean {text.strip()}GB?"
