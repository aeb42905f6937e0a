"""The table of the experts: a row for each layer, and the totals."""

from dataclasses import replace

from mixchat.chat.draw.expert_table import expert_table
from mixchat.engine.report import ExpertReport

TINY = ExpertReport(
    model="tiny",
    hits=[[3, 0, 7, 5], [0, 0, 0, 0]],
    misses=[[1, 0, 1, 3], [0, 0, 0, 0]],
    tiers=[["device", "disk", "host", "device"], ["disk", "disk", "disk", "device"]],
    slots={"device": 3, "host": 1},
    bytes_moved=4_000_000,
    stalled_seconds=1.5,
    predictions=4,
    right_predictions=3,
    tokens=10,
    seconds=6.0,
)


def test_a_row_has_a_layers_uses_hits_places_and_most_used_experts():
    assert expert_table(TINY).splitlines() == [
        "layer  uses  hits  GPU  RAM  disk  most used of 4",
        "    0    20   75%    2    1     1  2 (40%), 3 (40%), 0 (20%)",
        "    1     0     -    1    0     3  -",
        "",
        "experts  GPU 3 of 3 slots   RAM 1 of 1 slots   disk 4",
        "model    tiny: 10 tokens in 6 s",
        "uses     20, 75.0% hits; predictions 4, 3 right (75%)",
        "loaded   4 MB, 400 kB a token; waited 1.5 s, 25% of the run",
    ]


def test_a_model_of_many_experts_has_rows_of_the_same_width():
    many = replace(TINY, hits=[[1] * 512], misses=[[0] * 512], tiers=[["host"] * 512])
    assert max(map(len, expert_table(many).splitlines())) <= 80


def test_a_name_of_a_model_cannot_move_the_cursor():
    assert "\x1b" not in expert_table(replace(TINY, model="a\x1b[2J\nb"))
