"""The choice of types for the matrices of experts, against all other choices."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.options import ExpertSize
from mixchat.install.known_models import KNOWN
from mixchat.install.make.calibrator import ExpertInputs, Mix
from mixchat.install.make.mix import (
    Sensitivity,
    bits_of,
    budget_of,
    choose_mix,
    equal_sensitivities,
    forms_of,
    mixable_types,
    mixed,
    squared_error,
    summary,
    usual_type,
)
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

MIXTRAL = Blueprint(read_config(KNOWN["instruct"].config), Quantization())
SHORT = replace(MIXTRAL, config=replace(MIXTRAL.config, num_hidden_layers=2))
costs = st.floats(0.01, 10)


def types_of(form):
    up, down = form
    return up, down or up


def loss(forms, sensitivities):
    pairs = zip(map(types_of, forms), sensitivities, strict=True)
    return sum(
        each.up * squared_error(up) + each.down * squared_error(down) for (up, down), each in pairs
    )


@pytest.fixture(scope="module")
def sizes():
    """The bytes of a layer's experts in each form."""
    forms = itertools.product(mixable_types(), repeat=2)
    return {form: mixed(SHORT, [form] * 2).experts_size // 2 for form in forms}


@settings(max_examples=20)
@given(st.lists(st.builds(Sensitivity, costs, costs), min_size=2, max_size=2), st.floats(0, 1))
def test_no_choice_that_is_a_step_smaller_loses_less(sizes, sensitivities, part):
    """Steps that do not fit leave a part of the budget over."""
    least, most = min(sizes.values()), max(sizes.values())
    budget = int(2 * (least + part * (most - least)))
    chosen = choose_mix(SHORT, sensitivities, budget)
    assert chosen.experts_size <= budget
    smaller = [
        loss(forms, sensitivities)
        for forms in itertools.product(sizes, repeat=2)
        if sum(map(sizes.__getitem__, forms)) <= budget - (most - least)
    ]
    assert loss(forms_of(chosen), sensitivities) <= min(smaller, default=math.inf) + 1e-9


def test_layers_that_lose_more_get_more_bits():
    sensitivities = equal_sensitivities(MIXTRAL)
    sensitivities[0] = Sensitivity(5.0, 5.0)
    sensitivities[7] = Sensitivity(1.0, 50.0)
    chosen = choose_mix(MIXTRAL, sensitivities, budget_of(MIXTRAL, 3.4))
    forms = [types_of(form) for form in forms_of(chosen)]
    assert forms[0] == ("nf4", "nf4")
    assert forms[7][1] == "nf4"
    assert bits_of(chosen) == pytest.approx(3.4, rel=0.01)
    assert "nf4 in" in summary(chosen)


def test_a_budget_below_the_smallest_types_is_refused_with_what_they_take():
    with pytest.raises(UsageError, match=r"the experts take at least [\d.]+ GB") as caught:
        choose_mix(MIXTRAL, equal_sensitivities(MIXTRAL), 10**9)
    assert caught.value.hint == "Ask for more bits, or for more memory."


def test_the_largest_budget_gives_the_largest_types_alone():
    chosen = choose_mix(MIXTRAL, equal_sensitivities(MIXTRAL), 10**12)
    assert chosen == MIXTRAL


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("4", ExpertSize(4.0)),
        ("2.4", ExpertSize(2.4)),
        ("14GB", ExpertSize(memory=14 * 10**9)),
    ],
)
def test_a_number_is_bits_and_a_size_is_memory(text, read):
    assert ExpertSize.parse(text) == read
    assert str(read) == text


@pytest.mark.parametrize("text", ["", "0.5", "17", "nan", "1e1", "50%", "-3", "four"])
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError):
        ExpertSize.parse(text)


def test_whole_bits_name_a_type():
    assert usual_type(ExpertSize(4.0)) == "nf4"
    assert usual_type(ExpertSize(3.5)) is None
    with pytest.raises(UsageError, match="experts have"):
        usual_type(ExpertSize(7.0))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"request": "2.4"}',
        '{"request": "2.4", "forms": [["nf9", null], ["nf4", null]]}',
    ],
)
def test_a_damaged_note_of_the_types_is_named(tmp_path, content):
    inputs = ExpertInputs(tmp_path, SHORT.config)
    assert inputs.mix is None
    inputs.write_mix(Mix("2.4", [("trellis3", "trellis3"), ("nf4", None)]))
    assert inputs.mix == Mix("2.4", [("trellis3", "trellis3"), ("nf4", None)])
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"mix\.json"):
        assert inputs.mix
