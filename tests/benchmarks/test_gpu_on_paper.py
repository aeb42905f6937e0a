"""The table of predictions comes from the planning code, for every card, model and share."""

import json
import sys

import gpu_on_paper
import pytest
from gpu_on_paper import BITS, CARDS, fitting_slots, model_in, predict

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
