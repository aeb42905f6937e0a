"""The speed of products and prompts on a GPU, by bytes, instructions and operations."""

from dataclasses import replace

import pytest
from planning_tools import BLUEPRINT

from mixchat.planning.cards import cards, find_card
from mixchat.planning.gpu_speeds import EFFICIENCY, INSTRUCTIONS, GPUSpeeds, typical_gpu
from mixchat.weights.matrix.linear import TYPES

MATRIX = BLUEPRINT.expert.gate_up
SIZE = sum(tensor.nbytes for tensor in MATRIX.tensors)
H100, RTX_4060 = (GPUSpeeds.of_card(find_card(name)) for name in ("H100", "RTX 4060"))


def test_every_type_has_an_assumed_efficiency_and_a_count_of_instructions():
    assert set(EFFICIENCY) == set(INSTRUCTIONS) == set(TYPES)


def test_4_bits_are_read_at_the_pace_of_the_memory_and_a_trellis_at_that_of_arithmetic():
    """An H100 has bytes for more codes than it has time to decode: 3 bits are slower than 4."""
    four, three = (replace(MATRIX, quant_type=name) for name in ("nf4", "trellis3"))
    assert H100.part_for(four) == RTX_4060.part_for(four) == 0.8
    assert H100.part_for(three) < 0.3 < 0.6 < RTX_4060.part_for(three)
    assert H100.reading([three]) > H100.reading([four])
    assert RTX_4060.reading([three]) < RTX_4060.reading([four])


def test_a_measured_part_counts_and_the_instructions_of_a_measured_gpu_are_unknown():
    measured = GPUSpeeds("a GPU", 1e12, 1e10, 1e14, {"nf4": 0.66})
    assert measured.part_for(MATRIX) == 0.66
    assert measured.reading([MATRIX]) == pytest.approx(SIZE / 0.66e12)
    assert measured.part_for(replace(MATRIX, quant_type="trellis2")) == EFFICIENCY["trellis2"]


def test_many_rows_take_tensor_cores_and_few_take_what_dequantizing_takes():
    few, more, many = (H100.multiplying([MATRIX], rows) for rows in (1, 8, 8000))
    assert few == more < many
    weights = MATRIX.rows * MATRIX.columns
    assert many - few == pytest.approx(2 * weights * (8000 / H100.compute - 1 / H100.memory))
    assert few > H100.reading([MATRIX])


def test_bf16_is_slow_on_cards_before_ampere():
    turing, ampere = map(find_card, ("T4", "A10"))
    parts = [GPUSpeeds.of_card(card).compute / card.compute for card in (turing, ampere)]
    assert parts[0] == pytest.approx(0.25 * parts[1])


def test_a_card_for_games_decodes_4_bits_at_the_pace_of_its_memory():
    for card in cards():
        if card.name.startswith(("RTX", "RX")):
            assert GPUSpeeds.of_card(card).part_for(MATRIX) > 0.7, card.name
    assert GPUSpeeds.of_card(find_card("B200")).part_for(MATRIX) < 0.5


def test_the_typical_gpu_has_the_median_of_each_figure():
    samples = [GPUSpeeds("a GPU", x, 2 * x, 3 * x, {"nf4": x / 10}) for x in (1.0, 5.0, 2.0)]
    assert typical_gpu(samples) == GPUSpeeds("a GPU", 2.0, 4.0, 6.0, {"nf4": 0.2})
