"""The command line repeats what the engine says, so that --help need not import it."""

import dataclasses
import inspect

import pytest

from mixchat.cli.flags.checks import within_limits
from mixchat.cli.flags.model_flags import Sampling
from mixchat.cli.run import run
from mixchat.engine.sampling import SamplingOptions
from mixchat.errors import UsageError


def test_the_flags_have_the_names_of_the_engines_options_and_nothing_given_is_its_defaults():
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    assert [field.name for field in dataclasses.fields(Sampling)] == names
    assert set(names) <= set(inspect.signature(run).parameters)
    assert dataclasses.replace(Sampling().options(), seed=None) == SamplingOptions()


def test_what_the_models_makers_advise_goes_before_the_defaults_and_behind_the_flags():
    own = {"temperature": 0.2, "top_p": 0.9, "top_k": -1, "repeat_penalty": float("nan")}
    options = Sampling(top_p=0.5).options(own)
    assert (options.temperature, options.top_p) == (0.2, 0.5)
    assert (options.top_k, options.repeat_penalty) == (0, 1.0)


def test_options_carry_every_value_over():
    sampling = Sampling(0.1, 0.2, 3, 0.4, 1.5, 6)
    assert dataclasses.astuple(sampling.options()) == (0.1, 0.2, 3, 0.4, 1.5, 6)


def test_a_seed_is_drawn_where_none_is_given():
    seeds = {Sampling().options().seed for _ in range(5)}
    assert len(seeds) > 1
    assert None not in seeds


@pytest.mark.parametrize(
    "sampling", [(0.0, 1.0, 0, 0.0, 1.0, 0), (5.0, 0.001, 10**6, 0.999, 0.5, 2**63 - 1)]
)
def test_values_at_their_limits_are_fine(sampling):
    for name, value in dataclasses.asdict(Sampling(*sampling)).items():
        within_limits(name)(value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_value_outside_its_limits_is_refused(name, value):
    with pytest.raises(UsageError, match="has to be"):
        within_limits(name)(value)
