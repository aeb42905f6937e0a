"""README, `mixchat plan` and the script that measures the loss of few bits say the same."""

import math
from pathlib import Path

import pytest
import torch
from padded_model import padded_config
from quality import (
    HIDDEN,
    QUANT_TYPES,
    README_HEAD,
    UNQUANTIZED,
    Variant,
    demo_loss,
    divergence,
    readme_rows,
    rounded_bits,
)

from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.make.quantize_options import DEMO_LOSS
from mixchat.weights.source.demo import DEMO_CONFIG

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_FIGURES = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")


def full_table() -> dict[str, list[str]]:
    """Return the cells of each row of the whole table of quality, by the row's name."""
    rows = ALL_FIGURES[ALL_FIGURES.index(README_HEAD) + len(README_HEAD) :].split("\n\n")[0]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines() if row]
    return {name: rest for name, *rest in cells}


def measured(name: str, rounded: str, bits: float, loss: float) -> Variant:
    figures = {"prose": {"loss": [loss], "kl": [0.1]}, "code": {"loss": [loss + 1], "kl": [0.2]}}
    return Variant(name, rounded, bits, figures=figures)


def test_readme_has_the_figures_that_plan_prints():
    """README, `plan` and CHANGELOG had three sets of figures for the same loss."""
    for name, kind in QUANT_TYPES.items():
        cells = full_table()[name][-2:]
        shown = [cell.split(", ")[0] for cell in cells]
        assert shown == [f"{loss:.1%}" for loss in DEMO_LOSS[kind]]
        assert f"| {name:16} | {cells[0]:13} | {cells[1]:25} |" in README


@pytest.mark.parametrize(("name", "kind"), QUANT_TYPES.items())
def test_the_table_has_the_bits_of_the_tensors_that_are_rounded(name, kind):
    config = read_config(padded_config(DEMO_CONFIG, HIDDEN))
    how = Quantization(quant_type=kind, attention="int8", head="int8")
    bits = [f"{rounded_bits(Blueprint(config, how), part):.2f}" for part in ("experts", "all")]
    assert full_table()[name][0::3] == bits


def test_the_script_prints_what_readme_and_plan_have():
    variants = [measured(UNQUANTIZED, "all", 16, 3.0)]
    for form, bits, loss in (
        ("4 bits", 6.05, 3.1),
        ("4 bits, calibrated", 6.05, 3.05),
        ("3 bits", 5.66, 3.4),
        ("3 bits, calibrated", 5.66, 3.2),
    ):
        variants += [measured(form, "experts", 4.25, 3.0), measured(form, "all", bits, loss)]
    others = [measured("llama.cpp F16", "all", 16, 5.0)]
    others += [measured("llama.cpp Q4_0", part, 4.5, 5.2) for part in ("experts", "all")]
    for row in (rows := readme_rows([*variants, *others])):
        assert len(row) == len(README_HEAD.splitlines()[0])
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[2:5] == ["4.25", "0.0%, 0.150", "0.0%, 0.150"]
    assert cells[5:8] == ["6.05", "10.5%, 0.150", "5.1%, 0.150"]
    assert rows[2].split("|")[3].strip() == "22.1%, 0.150"
    rises = [math.expm1(loss) for loss in (0.1, 0.05, 0.4, 0.2)]
    expected = {"nf4": tuple(rises[:2]), "nf3": tuple(rises[2:])}
    assert demo_loss(variants) == {
        kind: pytest.approx(both, abs=5e-4) for kind, both in expected.items()
    }


def test_the_divergence_is_that_of_the_expected_distribution():
    expected, scores = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(scores, expected) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
