"""Misspelled flags, commands and models, and wrong values, get one clear line."""

import pytest


def lines_of(done):
    assert (done.stdout, done.returncode) == (b"", 2)
    return done.stderr.decode().splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --temprature 4", "--temperature"),
        ("run --prompt-cach Hi", "--prompt-cache"),
        ("dowload", "'download'?"),
        ("--nonsense", "--nonsense"),
        ("download", "MODEL"),
        ("run --temp hot", "'--temp' / '--temperature': Input should be a valid number"),
        ("serve --port 70000", "'--port': Input should be less than or equal to 65535"),
    ],
)
def test_what_is_wrong_or_missing_is_said_with_what_is_allowed(mixchat, words, said):
    error, hint = lines_of(mixchat(*words.split()))
    assert said in error
    assert "--help' shows" in hint


def test_config_set_names_the_file_that_is_edited(mixchat, environment):
    error, hint = lines_of(mixchat("config", "set", "ctx-size", "8k"))
    path = mixchat("config", "--path").stdout.decode().strip()
    assert error == f"error: to change a setting, edit {path}"
    assert "mixchat config --example" in hint


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mixtral", "instruct"), ("Demo", "demo"), ("dmo", "demo")],
)
def test_a_model_under_another_name_is_recognized(mixchat, name, meant):
    done = mixchat("run", "-m", name, "Hi", fake=False)
    assert done.stderr.decode().endswith(f"hint: Did you mean {meant}?\n")
    assert done.returncode == 4


@pytest.mark.parametrize("bits", ["5", "four"])
def test_wrong_bits_of_experts_are_said_with_all_that_is_allowed(mixchat, bits):
    error, hint = lines_of(mixchat("download", "base", "--expert-bits", bits))
    assert error == f"error: --expert-bits has to be 16, 4, 3 or 2, not {bits!r}"
    assert hint == "hint: Or a number such as 2.4, which mixes types, or a size such as 14GB."


def test_a_directory_without_a_model_is_not_to_be_downloaded(mixchat, tmp_path):
    """`run -m /etc` said "Download it first", and `bench DIRECTORY` spoke of --name."""
    for name in ("plain", "two words"):
        (tmp_path / name).mkdir()
        done = mixchat("bench", str(tmp_path / name))
        assert done.returncode == 4
        assert done.stderr.decode().splitlines() == [
            f"error: there is no installed model in {tmp_path / name}",
            "hint: There is no checkpoint in it either, which has a config.json.",
        ]
