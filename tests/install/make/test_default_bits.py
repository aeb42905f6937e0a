"""The bits that attention and head get if nobody chooses them."""

from typing import Any

import pytest
from weight_tools import get

from mixchat.base.errors import UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.install.known_models import KNOWN
from mixchat.install.make import quantize_options
from mixchat.install.make.quantize_options import (
    QuantizeOptions,
    default_dense_bits,
    make_blueprint,
)
from mixchat.install.source.checkpoint_index import expected_index
from mixchat.install.source.demo import DEMO_CONFIG
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.manifest import read_manifest

CONFIGS = {name: read_config(known.config) for name, known in KNOWN.items()}
CONFIGS["demo"] = read_config(DEMO_CONFIG)
EIGHT = {"instruct", "base", "8x22b", "demo"}
QWEN3 = CONFIGS["qwen3"]


@pytest.fixture
def for_small_models_too(monkeypatch):
    """Tiny models get the bits that their share of bytes gives large ones."""
    monkeypatch.setattr(quantize_options, "_SMALL_DENSE_BYTES", 0)


def dense_bits(config: ModelConfig, **options: Any) -> tuple[str, str]:
    """The types of attention and head in a download."""
    index = expected_index(config, "x")
    made = make_blueprint(index, QuantizeOptions(**options))
    return made.quantization.attention, made.quantization.head


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_small_experts_get_6_bits_and_mixtral_and_the_demo_8(name):
    expected = "int8" if name in EIGHT else "int6"
    assert dense_bits(CONFIGS[name]) == (expected, expected)


@pytest.mark.parametrize("limit", ["_SMALL_DENSE_BYTES", "_LARGE_DENSE_PART"])
@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_no_known_model_is_near_the_limits(monkeypatch, limit, factor):
    before = [default_dense_bits(config) for config in CONFIGS.values()]
    monkeypatch.setattr(quantize_options, limit, factor * getattr(quantize_options, limit))
    assert [default_dense_bits(config) for config in CONFIGS.values()] == before


def test_bits_that_are_requested_are_taken():
    assert dense_bits(QWEN3, attention=8) == ("int8", "int6")
    assert dense_bits(QWEN3, quant_type="none") == ("none", "none")
    assert dense_bits(QWEN3, quant_type="trellis3") == ("int6", "int6")
    assert dense_bits(CONFIGS["instruct"], head=6) == ("int8", "int6")


@pytest.mark.usefixtures("home", "for_small_models_too")
def test_a_download_without_flags_finds_a_model_of_an_earlier_default(tiny_checkpoint):
    """Models of small experts had 8 bits once. A download without flags still finds them."""
    source = str(tiny_checkpoint)
    installed = get(source, key="mine", options=QuantizeOptions(attention=8, head=8))
    assert get(source, key="mine") == installed
    assert read_manifest(installed).quantization["attention"] == "int8"
    with pytest.raises(UsageError, match="quantized differently"):
        get(source, key="mine", options=QuantizeOptions(attention=6, head=6))
    other = get(source, key="other", options=QuantizeOptions())
    assert read_manifest(other).quantization["attention"] == "int6"
