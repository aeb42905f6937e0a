"""The script that measures the loss of few bits prints what README and `mixchat plan` have."""

import math

import pytest
import torch
from quality import (
    README_HEAD,
    UNQUANTIZED,
    Variant,
    demo_loss,
    divergence,
    readme_rows,
)


def measured(name: str, rounded: str, bits: float, loss: float) -> Variant:
    figures = {"prose": {"loss": [loss], "kl": [0.1]}, "code": {"loss": [loss + 1], "kl": [0.2]}}
    return Variant(name, rounded, bits, figures=figures)


def test_the_script_prints_what_readme_and_plan_have() -> None:
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


def test_the_divergence_is_that_of_the_expected_distribution() -> None:
    expected, scores = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(scores, expected) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
