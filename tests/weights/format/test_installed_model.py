import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.weights.format import manifest
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import MANIFEST_COPY, MANIFEST_FILE, read_manifest


@pytest.fixture
def installed(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "models" / "mine"))


def edit_manifest(installed: Path, **changes: Any) -> None:
    """Change the manifest, and its own SHA-256 with it."""
    path = installed / MANIFEST_FILE
    document = {**json.loads(path.read_text()), **changes}
    del document["sha256"]
    path.write_text(json.dumps({**document, "sha256": manifest._digest(document)}))


def refusal(installed: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        InstalledModel(installed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_a_manifest_is_unfinished(installed):
    (installed / MANIFEST_FILE).unlink()
    assert "mixchat.json: the file is missing" in refusal(installed)  # its copy says what it was
    (installed / MANIFEST_COPY).unlink()
    assert "not a finished model" in refusal(installed)


@pytest.mark.parametrize("name", ["shared.safetensors", "experts-001.safetensors", "config.json"])
def test_a_short_long_or_missing_file_is_named(installed, name):
    size = (installed / name).stat().st_size
    os.truncate(installed / name, size - 1)
    assert f"{name}: {size - 1} bytes, but the manifest says {size}" in refusal(installed)
    os.truncate(installed / name, size + 1)
    assert f"{name}: {size + 1} bytes, but the manifest says {size}" in refusal(installed)
    (installed / name).unlink()
    assert f"{name}: the file is missing" in refusal(installed)


def test_files_of_another_layer_count_are_refused(installed):
    config = json.loads((installed / "config.json").read_text())
    config["num_hidden_layers"] = 3
    text = json.dumps(config, indent=2)
    (installed / "config.json").write_text(text)
    files = json.loads((installed / MANIFEST_FILE).read_text())["files"]
    files["config.json"]["size"] = len(text)
    edit_manifest(installed, files=files)
    assert "its tensors are not those of this model" in refusal(installed)


def test_a_file_of_another_model_is_refused(installed):
    shared, experts = installed / "shared.safetensors", installed / "experts-000.safetensors"
    shutil.copy(experts, shared)
    weights = json.loads((installed / MANIFEST_FILE).read_text())["weights"]
    weights["shared.safetensors"] = weights["experts-000.safetensors"]
    edit_manifest(installed, weights=weights)
    assert "its tensors are not those of this model" in refusal(installed)


def test_a_changed_manifest_is_found_by_its_own_hash(installed):
    path = installed / MANIFEST_FILE
    path.write_text(path.read_text().replace('"nf4"', '"nf3"'))
    assert "mixchat.json: damaged (its SHA-256 differs)" in refusal(installed)


@pytest.mark.parametrize("version", [99, 3, "4"])
def test_another_format_is_one_line_with_what_to_do(installed, version):
    edit_manifest(installed, format=version)
    with pytest.raises(CheckpointError, match=f"format {version!r}") as caught:
        read_manifest(installed)
    assert "download it again" in str(caught.value.hint)


@pytest.mark.parametrize("part", ["experts of all layers", "experts of one layer"])
def test_a_model_of_an_unknown_type_is_one_line_with_what_to_do(installed, part):
    """`repair` could not mend it."""
    raw = json.loads((installed / MANIFEST_FILE).read_text())
    if part == "experts of all layers":
        raw["quantization"]["quant_type"] = "nf3"
    else:
        raw["weights"]["experts-001.safetensors"]["quantization"]["quant_type"] = "nf3"
    edit_manifest(installed, quantization=raw["quantization"], weights=raw["weights"])
    with pytest.raises(CheckpointError, match="nf3") as caught:
        read_manifest(installed)
    assert "download it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": {"repo": "x", "surprise": 1}},
        {"source": {"repo": 5}},
        {"quantization": {}},
        {"files": []},
        {"files": {"../a": {"size": 1, "sha256": ""}}},
        {"files": {"a": {"size": "1", "sha256": ""}}},
        {"weights": None},
        {"weights": {"a": {"size": 1, "sha256": {"x": 1}}}},
        {"weights": {"../a": {"size": 1, "sha256": {}}}},
        {"weights": {"a": {"size": True, "sha256": {}}}},
        {"weights": {"a": {"size": 1, "sha256": {}, "quantization": {"dtype": "float32"}}}},
        {"weights": {"a": {"size": 1, "sha256": {}, "quantization": {"head": "none"}}}},
        {"checkpoint": {"a": 1}},
    ],
)
def test_a_malformed_manifest_is_refused(installed, changes):
    edit_manifest(installed, **changes)
    assert MANIFEST_FILE in refusal(installed)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quant_type", "fp4", "quant_type"),
        ("scales", [], "scales"),
        ("blocksize", 128, "blocksize"),
        ("blocksize", 32, "blocksize"),
        ("head", 1, "head 1 is not known"),
        ("head", False, "head False is not known"),
        ("head", "int5", "head 'int5' is not known"),
        ("head", "int4", "head 'int4' is not known"),
        ("attention", True, "attention True is not known"),
    ],
)
def test_an_unknown_quantization_is_refused(installed, key, value, said):
    quantization = json.loads((installed / MANIFEST_FILE).read_text())["quantization"]
    edit_manifest(installed, quantization={**quantization, key: value})
    assert said in refusal(installed)


def test_a_manifest_names_format_7_and_the_types(installed):
    document = json.loads((installed / MANIFEST_FILE).read_text())
    assert document["format"] == 7
    quantization = document["quantization"]
    assert (quantization["attention"], quantization["head"]) == ("int8", "int8")
