from pathlib import Path

import pytest

from mixchat.errors import UsageError
from mixchat.settings import MemoryBudget, data_dir, format_least, format_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("300M", 300_000_000),
        ("1.5GiB", 3 * 2**29),
        ("2gib", 2**31),
        ("12345", 12345),
        (" 7 kB ", 7000),
    ],
)
def test_a_budget_in_bytes(text: str, size: int) -> None:
    assert MemoryBudget.parse(text).of(10**12) == size


def test_a_budget_as_a_share() -> None:
    assert MemoryBudget.parse("50%").of(1000) == 500
    assert MemoryBudget.parse("100 %").of(1000) == 1000


@pytest.mark.parametrize(
    "text",
    ["", "9" * 400, "MB", "-3MB", "3 apples", "1e3", "300MiBB", "0%", "101%", "5%%", "٣MB", "inf"],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        MemoryBudget.parse(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (93_585_408, "93.6 MB"),
        (93_405_585_408, "93.4 GB"),
        (338_000_000, "338 MB"),
    ],
)
def test_sizes_are_written_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


def test_the_environment_chooses_the_data_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("MIXCHAT_HOME")
    assert data_dir().name == "mixchat"


@pytest.mark.parametrize("size", [1, 999, 1001, 24_576, 187_170_816, 10**9, 4_199_999_999])
def test_the_least_that_is_shown_is_enough(size: int) -> None:
    shown = MemoryBudget.parse(format_least(size).replace("bytes", "")).of(0)
    assert size <= shown <= 1.1 * size
