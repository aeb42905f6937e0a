import sys
from pathlib import Path

import pytest

from mixchat.errors import UsageError
from mixchat.settings import (
    MemoryBudget,
    config_file,
    data_dir,
    format_age,
    format_least,
    format_rates,
    format_size,
    read_config,
)


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


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where config.toml belongs; it is not there yet."""
    monkeypatch.delenv("MIXCHAT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "mixchat").mkdir()
    return tmp_path / "mixchat" / "config.toml"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's directories are those of Linux")
def test_the_settings_are_where_xdg_has_them_unless_a_variable_names_a_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config_file() == config
    monkeypatch.setenv("MIXCHAT_CONFIG", "")
    assert config_file() == config
    monkeypatch.setenv("MIXCHAT_CONFIG", "~/mine.toml")
    assert config_file() == Path.home() / "mine.toml"
    monkeypatch.setenv("MIXCHAT_CONFIG", "mine.toml")
    assert config_file() == Path.cwd() / "mine.toml"


def test_a_file_of_settings_need_not_be_there_unless_it_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_config(config) == {}
    monkeypatch.setenv("MIXCHAT_CONFIG", str(config))
    with pytest.raises(UsageError, match="there is no such file, MIXCHAT_CONFIG names it"):
        read_config(config)


@pytest.mark.parametrize("text", ["temp = 0.5", "\ufefftemp = 0.5\r\n", "# so it is\n\ntemp=0.5"])
def test_a_file_of_settings_is_toml(config: Path, text: str) -> None:
    config.write_text(text, encoding="utf-8", newline="")
    assert read_config(config) == {"temp": 0.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"model = demo", r"not TOML: Invalid value \(at line 1, column 9\)"),
        (b"temp = 1\ntemp = 2", "not TOML: Cannot overwrite a value"),
        (b"seed = " + b"9" * 5000, "not TOML: "),
        (b"stop = " + b"[" * 10_000, "not TOML: "),
        (b"# so\nsystem = 'caf\xe9'", "not UTF-8: the byte 0xe9 in line 2"),
        (b"#" * (10**6 + 1), "too large"),
    ],
)
def test_what_is_wrong_with_a_file_of_settings_is_said(
    config: Path, data: bytes, message: str
) -> None:
    config.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(config)
    assert str(caught.value).startswith(f"{config}: ")
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_file_of_settings(config: Path) -> None:
    config.mkdir()
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        read_config(config)


@pytest.mark.parametrize("name", ["nul\0byte", "loop"])
def test_a_name_that_cannot_be_a_file_is_said(config: Path, name: str) -> None:
    if name == "loop":
        (config.parent / name).symlink_to(name)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(config.parent / name)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.6174, 0.9121, "0.62 to 0.91"),
        (0.0312, 0.5, "0.031 to 0.5"),
        (1.04, 1.03, "1"),
        (9.4, 12.6, "9.4 to 13"),
        (98.4, 1234.0, "98 to 1234"),
    ],
)
def test_rates_have_two_digits_and_are_one_where_they_are_the_same(
    low: float, high: float, text: str
) -> None:
    assert format_rates(low, high) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5.0, "now"),
        (59.0, "now"),
        (61.0, "1 minute ago"),
        (7300.0, "2 hours ago"),
        (86400.0, "1 day ago"),
        (400 * 86400.0, "400 days ago"),
    ],
)
def test_an_age_has_one_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
