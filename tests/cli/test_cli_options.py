"""The command line repeats what the engine says, so that --help need not import it."""

import dataclasses
import inspect

import pytest

from mixchat.cli.options import Sampling
from mixchat.cli.run import run
from mixchat.engine.sampling import SamplingOptions


def test_the_flags_have_the_names_and_defaults_of_the_engines_options():
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingOptions)}
    parameters = inspect.signature(run).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    assert [field.name for field in dataclasses.fields(Sampling)] == list(defaults)


def test_options_carry_every_value_over():
    sampling = Sampling(0.1, 0.2, 3, 0.4, 1.5, 6)
    assert dataclasses.astuple(sampling.options()) == (0.1, 0.2, 3, 0.4, 1.5, 6)


def test_a_seed_is_drawn_where_none_is_given():
    seeds = {Sampling(0.7, 1.0, 0, 0.0, 1.0, None).options().seed for _ in range(5)}
    assert len(seeds) > 1
    assert None not in seeds


@pytest.mark.parametrize(
    "sampling", [(0.0, 1.0, 0, 0.0, 1.0, 0), (5.0, 0.001, 10**6, 0.999, 0.5, 2**63 - 1)]
)
def test_values_at_their_limits_are_fine(sampling):
    Sampling(*sampling).check()
