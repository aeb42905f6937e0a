"""The known models, as transformers and their publishers describe them."""

from math import prod

import pytest
from transformers import CONFIG_MAPPING

from mixchat.base.errors import UsageError
from mixchat.install.known_models import KNOWN
from mixchat.install.make.outline import known_blueprints
from mixchat.install.make.quantize_options import (
    QuantizeOptions,
    default_blueprint,
    experts_type,
    make_blueprint,
)
from mixchat.install.source.checkpoint_index import expected_index, expected_shapes
from mixchat.weights.families.read_config import read_config

# Billions of parameters, and GB on the hub.
PUBLISHED = {
    "instruct": (46.7, 93),
    "base": (46.7, 93),
    "8x22b": (140.6, 281),
    "qwen3": (30.5, 61),
    "qwen3-coder": (30.5, 61),
    "gpt-oss": (20.9, 14),
    "mellum2": (12.1, 24),
    "laguna": (33.4, 67),
    "olmoe": (6.9, 14),
    "granite": (3.3, 7),
    # Without what is left out, which is 1.3 billion of 36 in Qwen3.6.
    "qwen3.6": (34.7, 69),
    "qwen3-coder-next": (79.7, 159),
    "glm-4.7-flash": (29.9, 60),
    "gemma4": (25.2, 50),
    "lfm2": (8.3, 17),
    "lfm2-24b": (23.8, 48),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_size_that_its_publisher_names(name):
    shapes = expected_shapes(read_config(KNOWN[name].config))
    parameters = sum(map(prod, shapes.values()))
    known = KNOWN[name]
    assert (round(parameters / 1e9, 1), known.fetched_gb) == PUBLISHED[name]
    assert known.experts_quant_type or known.fetched_bytes == 2 * parameters


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_reads_the_same_in_a_known_config(name):
    raw = KNOWN[name].config
    theirs = CONFIG_MAPPING[raw["model_type"]](**raw)
    assert read_config(theirs.to_dict()) == read_config(raw)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen3.6", ("images", "predicting further tokens")),
        ("gemma4", ("images",)),
        ("glm-4.7-flash", ("predicting further tokens",)),
        ("qwen3-coder-next", ()),
    ],
)
def test_a_known_model_says_what_is_left_out(name, parts):
    assert read_config(KNOWN[name].config).left_out == parts


@pytest.mark.parametrize("name", KNOWN)
def test_the_first_layers_of_a_known_model_are_its_own(name):
    config = read_config(KNOWN[name].config)
    part = read_config(KNOWN[name].with_layers(5))
    assert part.num_hidden_layers == 5
    assert [*map(part.layer_type, range(5))] == [*map(config.layer_type, range(5))]


@pytest.mark.parametrize("wanted", ["nf4", "trellis3"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_is_planned_as_a_download_makes_it(name, wanted):
    """The first layers are of all kinds. A whole index has up to 70,000 tensors."""
    config, kind = read_config(KNOWN[name].with_layers(6)), KNOWN[name].experts_quant_type
    index, options = expected_index(config, name, mxfp4=kind == "mxfp4"), QuantizeOptions(wanted)
    if kind and wanted != "nf4":
        with pytest.raises(UsageError, match="has the experts in 4 bits already"):
            experts_type(name, kind, wanted)
        return
    planned = default_blueprint(config, experts_type(name, kind, wanted))
    assert make_blueprint(index, options) == planned


def test_the_weights_of_known_models_are_nearly_all_of_their_files():
    for blueprint in known_blueprints().values():
        assert blueprint.weights_size == pytest.approx(blueprint.size, rel=0.005)
