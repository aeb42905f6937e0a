"""The table of predictions comes from the planning code, for every card, model and share."""

import json
import sys

import gpu_on_paper
import pytest
from gpu_on_paper import BITS, CARDS, PUBLISHED, fitting_slots, model_in, predict

from mixchat.planning.cards import find_card

CARD = find_card("RTX 4060")


def test_more_experts_in_vram_and_fewer_bits_are_faster():
    four, two = (model_in(bits, "qwen3") for bits in (4, 2))
    shares = [predict(four, CARD, slots, 6e10) for slots in (0, 1000, 3072, four.expert_count)]
    speeds = [found.speed for found in shares]
    assert speeds == sorted(speeds)
    assert [found.launches for found in shares] == [144, 144, 144, 1]
    whole = {found.vram + found.ram for found in shares}
    assert max(whole) - min(whole) < 4  # rounded bytes
    assert shares[-1].ram == 0
    assert predict(two, CARD, 3072, 6e10).speed > shares[2].speed
    assert fitting_slots(two, CARD) > fitting_slots(four, CARD) > 0


@pytest.mark.parametrize(
    ("card", "model", "bits", "least", "most"),
    [
        ("RTX 3090", "qwen3", 4, 150, 190),
        ("RTX 3090", "gpt-oss", 4, 180, 225),
        ("RTX 4060", "qwen3", 4, 30, 38),
        ("RTX 4060", "instruct", 2, 15, 18),
        ("H100", "qwen3", 4, 250, 310),
    ],
)
def test_plans_are_within_a_quarter_of_published_figures_scaled_by_bytes(
    card, model, bits, least, most
):
    """They promised 1.3 to 2.4 times as much, because kernels, waits and Python hardly counted."""
    blueprint = model_in(bits, model)
    slots = fitting_slots(blueprint, find_card(card))
    assert least <= predict(blueprint, find_card(card), slots, 6e10).speed <= most


@pytest.mark.parametrize("row", PUBLISHED[:2] + PUBLISHED[3:5], ids=lambda row: row.card)
def test_plans_are_within_a_quarter_of_what_llama_cpp_reaches_on_other_cards_too(row):
    blueprint = model_in(4, row.model)
    slots = round(row.share * blueprint.expert_count)
    found = predict(blueprint, find_card(row.card), slots, 1e9 * (row.ram or 60))
    assert 0.75 * row.speed <= found.speed <= 1.25 * row.speed


def test_it_prints_rows_for_programs_and_tables_for_people(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_on_paper.py", "--json"])
    gpu_on_paper.main()
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 * len(CARDS) * sum(map(len, BITS.values()))
    assert min(row["speed"] for row in rows) > 1
    monkeypatch.setattr(sys, "argv", ["gpu_on_paper.py"])
    gpu_on_paper.main()
    tables = capsys.readouterr().out.split("\n\n")
    assert [len(table.splitlines()) > 6 for table in tables] == [True] * 3


def test_gpt_oss_stays_in_the_bits_in_which_it_is_published():
    assert model_in(4, "gpt-oss").expert.gate_up.quant_type == "mxfp4"
    assert model_in(3, "qwen3").expert.gate_up.quant_type == "trellis3"
    with pytest.raises(StopIteration):
        model_in(4, "no such model")
