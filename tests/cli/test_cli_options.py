"""Flags have the names of the options, one text in all commands, and values within limits."""

import dataclasses

import pytest
import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import SamplingOptions
from mixchat.cli.app import app
from mixchat.cli.flags.load_flags import within_limits
from mixchat.cli.flags.run_flags import RunFlags
from mixchat.face.numbers import SAMPLING, accepted_numbers, with_numbers

NAMES = [number.field for number in SAMPLING.values()]
NOTHING_GIVEN = dict.fromkeys(NAMES)


def test_the_flags_have_the_names_of_the_options_and_nothing_given_is_the_defaults():
    assert set(NAMES) <= {field.name for field in dataclasses.fields(RunFlags)}
    options = with_numbers(SamplingOptions(), NOTHING_GIVEN)
    assert dataclasses.replace(options, seed=None) == SamplingOptions()


def test_what_the_models_makers_advise_goes_before_the_defaults_and_behind_the_flags():
    advised = {"temperature": 0.2, "top_p": 0.9, "top_k": -1, "repeat_penalty": float("nan")}
    options = with_numbers(with_numbers(SamplingOptions(), advised), NOTHING_GIVEN | {"top_p": 0.5})
    assert (options.temperature, options.top_p) == (0.2, 0.5)
    assert (options.top_k, options.repeat_penalty) == (0, 1.0)


def test_options_carry_every_value_over():
    given = dict(zip(NAMES, (0.1, 0.2, 3, 0.4, 1.5, 6), strict=True))
    assert accepted_numbers(vars(with_numbers(SamplingOptions(), given))) == given


@pytest.mark.parametrize(
    ("values", "beyond"),
    [
        ((0.0, 1e-9, 0, 0.0, 0.01, 0), (-0.1, 0.0, -1, -0.1, 0.009, -1)),
        (
            (1e9, 1.0, 2**31 - 1, 0.999, 100.0, 2**63 - 1),
            (float("inf"), 1.1, 2**31, 1.0, 101.0, 2**63),
        ),
    ],
)
def test_a_value_at_its_limit_is_taken_and_one_beyond_it_is_not(values, beyond):
    for name, value, other in zip(NAMES, values, beyond, strict=True):
        within_limits(name)(value)
        with pytest.raises(UsageError):
            within_limits(name)(other)


def helps() -> dict[str, dict[str, str]]:
    """The help of each option, by the option and the command."""
    found: dict[str, dict[str, str]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        for option in (each for each in command.params if each.param_type_name == "option"):
            found.setdefault(option.opts[0], {})[name] = " ".join(option.help.split())
    return found


def test_a_flag_has_the_same_help_in_all_commands():
    """`--json` and `--dense-bits` had three texts each."""
    unlike = {flag for flag, texts in helps().items() if len(set(texts.values())) > 1}
    assert unlike == {
        "--json",
        "--keep-cache",
        "--expert-bits",
        "--dense-bits",
    }  # mean other things


def test_the_help_of_a_flag_is_one_sentence():
    texts = {text for commands in helps().values() for text in commands.values()}
    assert [text for text in texts if ". " in text or not text.endswith(".")] == []


def test_the_first_line_of_a_command_fits_the_list_of_commands(mixchat):
    """Three of 18 were cut off."""
    listed = mixchat("--help", COLUMNS="80").stdout.decode().partition("Commands:\n")[2]
    for name, command in typer.main.get_command(app).commands.items():
        summary = " ".join(command.help.partition("\n\n")[0].split())
        assert command.hidden or f"  {name:9}  {summary}\n" in listed
