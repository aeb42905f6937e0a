"""A huge number in a foreign config is refused before anything of its size is made."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import gguf_files
import pytest

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import SafetensorsFile
from mixchat.install.known_models import KNOWN
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint_index import CheckpointIndex
from mixchat.install.source.gguf_checkpoint import read_gguf
from mixchat.install.source.gguf_file import GgufFile, GgufHeader
from mixchat.weights.families.read_config import FAMILIES, read_config

# The smallest first, which a test survives. It is a quarter of what the limits let pass.
NUMBERS = (4_000, 10**6, 2**31 - 1, 10**12)
PEAK_BYTES = 50_000_000 // 4


def changed(values: Any, other: object, types: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the values with each value of these types in them replaced, with its key."""
    places = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in places:
        cases: list[tuple[str, object]] = []
        if isinstance(value, (dict, list)):
            cases = [*changed(value, other, types)]
        if type(value) in types:
            cases.append(("", other))
        for name, case in cases:
            copy = deepcopy(values)
            copy[key] = case
            yield f"{key} {name}".strip(), copy


def with_all_heads(values: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the values with all counts of heads replaced, so that they divide each other."""
    heads = [key for key in values if "heads" in key or "head_count" in key or "ssm." in key]
    return {**values, **dict.fromkeys(heads, number)}


def faults(values: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> dict[str, str]:
    """Return what was wrong with each change by its key, "" if nothing was.

    Fails if reading took much memory.
    """
    found: dict[str, str] = {}
    tracemalloc.start()
    try:
        for number in NUMBERS:
            cases = [
                *changed(values, number, (int,)),
                ("all heads", with_all_heads(values, number)),
            ]
            for key, case in cases:
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                try:
                    read(case)
                    found[f"{key} {number}"] = ""
                except CheckpointError as error:
                    found[f"{key} {number}"] = str(error)
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before < PEAK_BYTES, (key, number)
    finally:
        tracemalloc.stop()
    assert all(len(line) < 300 and line.isprintable() for line in found.values())
    assert found[f"all heads {NUMBERS[0]}"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_config_json(family, make_checkpoint):
    """A count of 10**8 heads took 5.4 GB: each got its slices before a shape was compared."""
    checkpoint = make_checkpoint(model_type=family)
    raw = json.loads((checkpoint / "config.json").read_text())
    with SafetensorsFile(checkpoint / "model.safetensors") as file:
        header = file.header

    def read(case: dict[str, Any]) -> None:
        index = CheckpointIndex(read_config(case), {"model": header}, None, "here")
        make_blueprint(index, QuantizeOptions())

    read(raw)
    found = faults(raw, read)
    assert found[f"hidden_size {NUMBERS[0]}"]
    assert found[f"num_hidden_layers {NUMBERS[0]}"]
    assert not found[f"max_position_embeddings {NUMBERS[0]}"]


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_of_the_metadata_of_a_gguf(family, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(model_type=family, vocab_size=262)
    path = gguf_files.write(checkpoint, tmp_path / "model.gguf")
    with GgufFile(path) as file:
        header = file.header

    def read(case: dict[str, Any]) -> None:
        entries = {spec.name: (spec, header.start(spec.name)) for spec in header.specs}
        other = GgufHeader(entries, case, header.size, "here")
        index, _ = read_gguf({"model": other}, "here")
        make_blueprint(index, QuantizeOptions())

    short = {key: value for key, value in header.metadata.items() if "tokenizer" not in key}
    whole = dict(header.metadata)
    read(whole)
    found = faults(short, lambda case: read({**whole, **case}))
    name = header.metadata["general.architecture"]
    assert found[f"{name}.embedding_length {NUMBERS[0]}"]
    assert found[f"{name}.block_count {NUMBERS[0]}"]


ODD = ["\n" * 5000, None, 0, -1, 1.5, "x", True, [], [0], {}, {"rope_type": 1}, ["full_attention"]]
ANY_TYPE = (int, float, bool, str, list, dict, type(None))


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3.6", "gemma4 with images"])
def test_no_odd_or_missing_value_ends_the_program_or_is_repeated_in_full(name, make_checkpoint):
    """A line of the length of the value said that it is no positive number.

    A model_type that was a list ended the program, and so did a missing layer_types of LFM2.
    """
    if name in FAMILIES:
        checkpoint = make_checkpoint(model_type=name)
        raw = json.loads((checkpoint / "config.json").read_text())
    else:  # of more than text
        raw = KNOWN[name.split()[0]].config
    cases = [case for odd in ODD for _, case in changed(raw, odd, ANY_TYPE)]
    cases += [{key: raw[key] for key in raw if key != missing} for missing in raw]
    lines = []
    for case in cases:
        try:
            config = read_config(case)
        except CheckpointError as error:
            lines.append(str(error))
        else:
            assert len(config.layer_types) in (0, config.num_hidden_layers)
    assert len(lines) > 10
    assert all(len(line) < 300 and line.isprintable() for line in lines)
