"""The page on quality, `mixchat plan` and the script that measures both say the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from frontier import draw
from padded_model import padded_config
from peer_types import FORMS
from quality import README_HEAD, Variant, demo_loss, divergence, points, readme_rows
from quality_forms import HIDDEN, QUANT_TYPES, UNQUANTIZED, rounded_bits

from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.install.source.demo import DEMO_CONFIG
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

ROOT = Path(__file__).parents[2]
QUALITY = (ROOT / ".github/quality.md").read_text(encoding="utf-8")
ALL_FIGURES = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")


def full_table() -> dict[str, list[str]]:
    """Return the cells of each row of the whole table of quality, by the row's name."""
    rows = ALL_FIGURES[ALL_FIGURES.index(README_HEAD) + len(README_HEAD) :].split("\n\n")[0]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines() if row]
    return {name: rest for name, *rest in cells}


def measured(
    name: str, rounded: str, bits: float, loss: float, program: str = "mixchat"
) -> Variant:
    figures = {"prose": {"loss": [loss], "kl": [0.1]}, "code": {"loss": [loss + 1], "kl": [0.2]}}
    return Variant(name, rounded, bits, program, figures)


def test_readme_has_the_figures_that_plan_prints():
    """The page, `plan` and CHANGELOG had three sets of figures for the same loss."""
    for name in QUANT_TYPES:
        cells = full_table()[name][-2:]
        shown = [cell.split(", ")[0] for cell in cells]
        assert shown == [f"{loss:.1%}" for loss in DEMO_LOSS[name[0]]]
        assert f"| {name:16} | {cells[0]:13} | {cells[1]:25} |" in QUALITY


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
    others = [measured("Q4_0", part, 4.5, 3.2, "llama.cpp") for part in ("experts", "all")]
    for row in (rows := readme_rows([*variants, *others])):
        assert len(row) == len(README_HEAD.splitlines()[0])
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[2:5] == ["4.25", "0.0%, 0.150", "0.0%, 0.150"]
    assert cells[5:8] == ["6.05", "10.5%, 0.150", "5.1%, 0.150"]
    assert rows[2].split("|")[1].strip() == "llama.cpp Q4_0"
    assert [cell.strip() for cell in rows[2].split("|")[3:5]] == ["", "22.1%, 0.150"]
    rises = [math.expm1(loss) for loss in (0.1, 0.05, 0.4, 0.2)]
    expected = {"4": rises[:2], "3": rises[2:]}
    assert demo_loss(variants) == {
        bits: pytest.approx(both, abs=5e-4) for bits, both in expected.items()
    }


def test_the_divergence_is_that_of_the_expected_distribution():
    expected, scores = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(scores, expected) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_the_frontier_is_written_as_data_and_as_a_picture(tmp_path):
    variants = [
        measured(UNQUANTIZED, "all", 16, 3.0),
        measured("3 bits", "experts", 3.25, 3.2),
        measured("IQ3<S", "experts", 3.5, 3.1, "llama.cpp"),
    ]
    variants[2].figures["prose"]["kl"] = [0.02]
    first, second = points(variants)
    assert (second.kl, second.texts["prose"][0]) == (pytest.approx(0.11), 0.02)
    draw([first, second], tmp_path)
    data = json.loads((tmp_path / "frontier.json").read_bytes())
    assert data[1]["texts"] == {
        "prose": [0.02, pytest.approx(math.expm1(0.1))],
        "code": [0.2, pytest.approx(math.expm1(0.1))],
    }
    svg = (tmp_path / "frontier-experts.svg").read_text()
    assert all(f">{text}</text>" in svg for text in ("3 bits", "IQ3&lt;S", "mixchat", "llama.cpp"))


@pytest.mark.parametrize(
    ("form", "matrix", "layer", "kind"),
    [
        ("Q4_K_M", "block_sparse_moe.experts.3.w2", 0, "Q6_K"),
        ("Q4_K_M", "block_sparse_moe.experts.3.w2", 4, "Q4_K"),
        ("Q4_K_M", "self_attn.v_proj", 5, "Q6_K"),
        ("Q3_K_M", "block_sparse_moe.experts.3.w2", 0, "Q5_K"),
        ("Q3_K_M", "block_sparse_moe.experts.3.w1", 0, "Q3_K"),
        ("Q3_K_M", "self_attn.v_proj", 2, "Q4_K"),
        ("IQ2_XS", "block_sparse_moe.experts.3.w2", 0, "IQ2_XS"),
        ("IQ2_XS", "self_attn.k_proj", 9, "IQ2_XS"),
        ("IQ2_XS", "self_attn.o_proj", 9, "IQ2_XS"),
        ("IQ2_XS", "block_sparse_moe.gate", 9, None),
        ("IQ2_XS", "input_layernorm", 9, None),
    ],
)
def test_matrices_have_the_types_that_llama_quantize_gives_them(form, matrix, layer, kind):
    """llama-quantize named them in a dry run of the padded demo."""
    (found,) = (one for one in FORMS["llama.cpp"] if one.name == form)
    assert found.type_of(f"model.layers.{layer}.{matrix}.weight", 30) == kind
    assert found.type_of("lm_head.weight", 30) == ("Q5_K" if form == "IQ2_XS" else "Q6_K")
    assert found.type_of("model.embed_tokens.weight", 30) is None
