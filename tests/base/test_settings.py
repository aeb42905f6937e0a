import sys
from pathlib import Path

import pytest

from mixchat.base.errors import UsageError
from mixchat.base.settings import config_file, data_dir, read_config


def test_the_environment_chooses_the_data_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("MIXCHAT_HOME")
    assert data_dir().name == "mixchat"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of config.toml, which does not exist yet."""
    monkeypatch.delenv("MIXCHAT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "mixchat").mkdir()
    return tmp_path / "mixchat" / "config.toml"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's directories are those of Linux")
def test_the_settings_are_where_xdg_has_them_unless_a_variable_names_a_file(config, monkeypatch):
    assert config_file() == config
    monkeypatch.setenv("MIXCHAT_CONFIG", "")
    assert config_file() == config
    monkeypatch.setenv("MIXCHAT_CONFIG", "~/mine.toml")
    assert config_file() == Path.home() / "mine.toml"
    monkeypatch.setenv("MIXCHAT_CONFIG", "mine.toml")
    assert config_file() == Path.cwd() / "mine.toml"


def test_a_file_of_settings_may_be_missing_unless_a_variable_names_it(config, monkeypatch):
    assert read_config(config) == {}
    monkeypatch.setenv("MIXCHAT_CONFIG", str(config))
    with pytest.raises(UsageError, match=r"there is no such file \(MIXCHAT_CONFIG names it\)"):
        read_config(config)


@pytest.mark.parametrize("text", ["temp = 0.5", "\ufefftemp = 0.5\r\n", "# so it is\n\ntemp=0.5"])
def test_a_file_of_settings_is_toml(config, text):
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
def test_a_damaged_file_of_settings_is_described(config, data, message):
    config.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(config)
    assert str(caught.value).startswith(f"{config}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nul\0byte", "loop", "directory"])
def test_what_cannot_be_a_file_is_an_error(config, name):
    (config.parent / "loop").symlink_to("loop")
    (config.parent / "directory").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(config.parent / name)
