"""config.toml, variables and flags, in that order; and `mixchat config`, which shows what holds."""

import json
import re
import sys

import pytest
from test_cli_run import prompts_in

from mixchat.base.errors import UsageError
from mixchat.cli.flags.settings import all_settings
from mixchat.face.load import checked_load_options


@pytest.fixture
def config_file(tmp_path):
    """Writes a config.toml where XDG has it; returns its place."""

    def write(text):
        place = tmp_path / "config" / "mixchat" / "config.toml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        return place

    if sys.platform != "linux":
        pytest.skip("XDG's directories are those of Linux")
    return write


def holding(done):
    return json.loads(done.stdout)["settings"]


def first_line(done):
    return done.stderr.decode().splitlines()[0]


def settings():
    import typer

    from mixchat.cli.app import app

    return all_settings(typer.main.get_command(app).commands)


def test_a_flag_goes_before_a_variable_and_that_before_the_file(mixchat, config_file):
    config_file("max-tokens = 4")
    assert mixchat("run", "Hi").stdout == b"Hell\n"
    assert mixchat("run", "Hi", MIXCHAT_MAX_TOKENS=3).stdout == b"Hel\n"
    assert mixchat("run", "Hi", "-n", "2", MIXCHAT_MAX_TOKENS=3).stdout == b"He\n"
    assert mixchat("run", "Hi", MIXCHAT_MAX_TOKENS="").stdout == b"Hell\n"


def test_a_context_can_be_given_in_units_of_1024_tokens(mixchat, config_file):
    """Every other tool takes 8k, and mixchat did not."""

    def size(**variables):
        return holding(mixchat("config", "--json", **variables))["ctx-size"]["value"]

    assert size(MIXCHAT_CTX_SIZE="8k") == 8192
    config_file('ctx-size = "4K"')
    assert size() == 4096
    config_file("ctx-size = 5000")
    assert size() == 5000
    wrong = mixchat("run", "Hi", "--ctx-size", "8kk")
    assert b"'--ctx-size': '8kk' is not a valid integer" in wrong.stderr
    for text, value in (("16k", 16384), ("300", 300)):
        assert checked_load_options({"context_size": text}).context_size == value
    for text in ("1.5k", "-1k", "9999999k", "many"):
        with pytest.raises(UsageError, match="context_size has to be between 2 and"):
            checked_load_options({"context_size": text})


def test_every_kind_of_value_can_stand_in_the_file(mixchat, config_file, tmp_path):
    config_file('system = """Be\nbrief"""\nstop = ["l", "z z"]\nverbose = true\nseed = 7\ntemp = 0')
    done = mixchat("run", "Hi", PROMPTS=tmp_path / "prompts")
    assert done.stdout == b"He\n"
    assert prompts_in(tmp_path / "prompts") == ["[system]Be\nbrief[user]Hi"]
    assert b"seed     7" in done.stderr
    assert mixchat("run", "Hi", "--no-verbose").stderr == b""
    assert mixchat("run", "Hi", MIXCHAT_VERBOSE="0").stderr == b""


def test_a_list_in_a_variable_is_split_at_spaces(mixchat):
    assert mixchat("run", "Hi", MIXCHAT_STOP="zz l").stdout == b"He\n"
    held = holding(mixchat("config", "--json", MIXCHAT_WORKER="10.0.0.1 helper:80"))
    assert held["worker"] == {"value": ["10.0.0.1", "helper:80"], "from": "MIXCHAT_WORKER"}


@pytest.mark.parametrize("command", [["stats"], ["plan"], ["run", "Hi"]])
def test_the_model_is_that_of_the_file(mixchat, config_file, command):
    config_file('model = "nonsense"')
    assert "'nonsense'" in first_line(mixchat(*command, fake=False))
    again = mixchat(*command, fake=False, MIXCHAT_MODEL="rubbish")
    assert "'rubbish'" in first_line(again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('temp = "hot"', "temp: Input should be a valid number, .*"),
        ("model = false", "model has to be text in quotes, not false"),
        ('model = ""', "model is empty"),
        ("ctx-size = 0", "ctx-size has to be between 2 and 2147483647, not 0"),
        ("seed = 0x" + "f" * 6000, "seed is too large a number"),
        ('verbose = "yes"', "verbose has to be true or false, not 'yes'"),
        ('stop = "END"', r'stop has to be a list of texts, such as \["END"\]'),
        ('worker = ["a b"]', r"worker: cannot read 'a b' as HOST\[:PORT\]"),
        ('jsonl = "x"', "jsonl is a flag of one run, not a setting"),
        ("help = true", "there is no setting 'help'"),
        (b"\xff", "not UTF-8: the byte 0xff in line 1"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_name_and_the_key(
    mixchat, config_file, text, message
):
    place = config_file(text)
    for command in (["run", "Hi"], ["config"]):
        done = mixchat(*command)
        assert done.returncode == 2
        assert re.fullmatch(f"error: {re.escape(str(place))}: ({message})", first_line(done))
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("key", "meant"),
    [("tmp", "temp"), ("temperature", "temp"), ("ctx_size", "ctx-size")],
)
def test_a_key_that_is_no_setting_is_said_with_the_one_that_was_meant(
    mixchat, config_file, key, meant
):
    config_file(f"{key} = 1")
    done = mixchat("run", "Hi")
    assert f"there is no setting '{key}'" in first_line(done)
    assert f"hint: Did you mean {meant}? " in done.stderr.decode()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXCHAT_VERBOSE", "perhaps", "MIXCHAT_VERBOSE: Input should be a valid boolean"),
        ("MIXCHAT_HOST_MEMORY", "lots", "MIXCHAT_HOST_MEMORY: cannot read 'lots'"),
        ("MIXCHAT_MODEL", "caf\udce9", "MIXCHAT_MODEL is not UTF-8"),
    ],
)
def test_what_is_wrong_in_a_variable_is_said_with_its_name(mixchat, variable, value, message):
    done = mixchat("run", "Hi", **{variable: value})
    assert (done.returncode, done.stdout) == (2, b"")
    assert first_line(done).startswith(f"error: {message}")


@pytest.mark.parametrize("command", [["run", "--help"], ["list"], ["config", "--path"], ["gc"]])
def test_a_damaged_file_is_in_the_way_of_nothing_that_needs_no_setting(
    mixchat, config_file, command
):
    config_file("model = demo")
    assert mixchat(*command).returncode == 0


def test_config_shows_what_holds_and_where_it_is_from(mixchat, config_file):
    place = config_file('model = "demo"\nmax-tokens = 5')
    lines = mixchat("config", MIXCHAT_TEMP="0", MIXCHAT_MAX_TOKENS="6").stdout.decode().splitlines()
    rows = [re.split(r" {2,}", line) for line in lines]
    assert rows[0] == ["SETTING", "VALUE", "FROM"]
    assert ["model", '"demo"', "config.toml"] in rows
    assert ["temp", "0.0", "MIXCHAT_TEMP"] in rows
    assert ["max-tokens", "6", "MIXCHAT_MAX_TOKENS"] in rows
    assert ["top-p", "the model's, else 1", "default"] in rows
    assert ["system", "-", "default"] in rows
    assert lines[-1] == str(place)


def test_config_as_json_has_every_setting(mixchat, config_file):
    config_file('stop = ["a b"]')
    done = mixchat("config", "--json")
    assert holding(done).keys() == settings().keys()
    assert holding(done)["stop"] == {"value": ["a b"], "from": "config.toml"}
    assert holding(done)["temp"] == {"value": None, "from": "default"}
    assert holding(done)["verbose"] == {"value": False, "from": "default"}
    assert json.loads(done.stdout)["exists"] is True


def test_config_keeps_a_long_or_strange_value_on_one_line(mixchat, config_file):
    config_file('system = "\\u001b[2J' + "long \\n" * 100 + '"')
    done = mixchat("config").stdout.decode()
    assert "\x1b" not in done
    assert len(done.splitlines()) == len(settings()) + 3
    assert max(map(len, done.splitlines()[:-1])) < 100


def test_the_example_has_every_setting_and_sets_none(mixchat, config_file):
    example = mixchat("config", "--example").stdout.decode()
    config_file(example)
    assert mixchat("config").returncode == 0
    assert {each["from"] for each in holding(mixchat("config", "--json")).values()} == {"default"}
    assert set(re.findall(r"^#([a-z-]+) = ", example, flags=re.MULTILINE)) == settings().keys()


def test_every_setting_has_a_variable_of_its_name():
    for key, parameter in settings().items():
        assert f"--{key}" in parameter.opts
        assert parameter.envvar == "MIXCHAT_" + key.upper().replace("-", "_")
    assert not {"jsonl", "prompt-cache", "help"} & settings().keys()
    assert len({parameter.envvar for parameter in settings().values()}) == len(settings())


@pytest.fixture
def asked(mixchat, tmp_path):
    """Asks `Hi`, and returns the prompt that the engine got."""

    def ask(*flags, **variables):
        (tmp_path / "prompts").write_text("")
        done = mixchat("run", "Hi", *flags, PROMPTS=tmp_path / "prompts", **variables)
        assert (done.stderr, done.returncode) == (b"", 0)
        return prompts_in(tmp_path / "prompts")[0].removesuffix("[user]Hi")

    return ask


@pytest.fixture
def persona(tmp_path):
    """A file with a system prompt."""
    file = tmp_path / "persona.txt"
    file.write_text("Be\nbrief.\n")
    return file


def test_a_file_gives_the_system_prompt_from_wherever_it_is_named(asked, config_file, persona):
    from_file = "[system]Be\nbrief."
    assert asked("--system-file", persona) == from_file
    assert asked(MIXCHAT_SYSTEM_FILE=persona) == from_file
    config_file(f'system-file = "{persona}"')
    assert asked() == from_file


def test_of_system_and_its_file_the_nearer_one_counts(asked, config_file, persona):
    config_file('system = "far"')
    assert asked(MIXCHAT_SYSTEM_FILE=persona) == "[system]Be\nbrief."
    assert asked("-s", "near", MIXCHAT_SYSTEM_FILE=persona) == "[system]near"
    assert asked("-s", "", MIXCHAT_SYSTEM_FILE=persona) == ""
    assert asked("--system-file", persona, MIXCHAT_SYSTEM="far") == "[system]Be\nbrief."


def test_system_and_its_file_exclude_each_other(mixchat, config_file, persona):
    done = mixchat("run", "Hi", "-s", "x", "--system-file", persona)
    assert first_line(done) == "error: --system and --system-file exclude each other"
    assert done.returncode == 2
    done = mixchat("run", "Hi", MIXCHAT_SYSTEM="x", MIXCHAT_SYSTEM_FILE=persona)
    assert first_line(done) == "error: MIXCHAT_SYSTEM and MIXCHAT_SYSTEM_FILE exclude each other"
    path = config_file('system = "x"\nsystem-file = "y"')
    done = mixchat("run", "Hi")
    assert first_line(done) == f"error: {path}: system and system-file exclude each other"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "{}: cannot be read (No such file or directory)"),
        (b"a\0b", "{} is not text: it contains a NUL byte at offset 1"),
        (b"x" * 10**7, "{}"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused_as_one_of_f_is(mixchat, tmp_path, content, error):
    file = tmp_path / "persona"
    if content is not None:
        file.write_bytes(content)
    done, other = mixchat("run", "Hi", "--system-file", file), mixchat("run", "Hi", "-f", file)
    assert first_line(done).startswith(f"error: {error.format(file)}")
    assert (done.stderr, done.returncode) == (other.stderr, 3)


def test_standard_input_is_for_the_question(mixchat):
    done = mixchat("run", "Hi", MIXCHAT_SYSTEM_FILE="-")
    assert first_line(done).startswith("error: MIXCHAT_SYSTEM_FILE cannot be standard input")
    assert done.returncode == 2
