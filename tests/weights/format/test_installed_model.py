import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixchat.errors import CheckpointError
from mixchat.weights.format import manifest
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import MANIFEST_COPY, MANIFEST_FILE, read_manifest


@pytest.fixture
def kept(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "kept"))


def edit_manifest(kept: Path, **changes: Any) -> None:
    """Change the manifest, and its own SHA-256 with it."""
    path = kept / MANIFEST_FILE
    document = {**json.loads(path.read_text()), **changes}
    del document["sha256"]
    path.write_text(json.dumps({**document, "sha256": manifest._digest(document)}))


def refusal(kept: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        InstalledModel(kept)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model_opens(kept: Path) -> None:
    with InstalledModel(kept) as model:
        assert model.blueprint.expert_count == 8


def test_a_directory_without_a_manifest_is_unfinished(kept: Path) -> None:
    (kept / MANIFEST_FILE).unlink()
    assert "mixchat.json: the file is missing" in refusal(kept)  # its copy says what it was
    (kept / MANIFEST_COPY).unlink()
    assert "not a finished model" in refusal(kept)


@pytest.mark.parametrize("name", ["shared.safetensors", "experts-001.safetensors", "config.json"])
def test_a_short_long_or_missing_file_is_named(kept: Path, name: str) -> None:
    size = (kept / name).stat().st_size
    os.truncate(kept / name, size - 1)
    assert f"{name}: {size - 1} bytes, but the manifest says {size}" in refusal(kept)
    os.truncate(kept / name, size + 1)
    assert f"{name}: {size + 1} bytes, but the manifest says {size}" in refusal(kept)
    (kept / name).unlink()
    assert f"{name}: the file is missing" in refusal(kept)


def test_files_of_another_layer_count_are_refused(kept: Path) -> None:
    config = json.loads((kept / "config.json").read_text())
    config["num_hidden_layers"] = 3
    text = json.dumps(config, indent=2)
    (kept / "config.json").write_text(text)
    files = json.loads((kept / MANIFEST_FILE).read_text())["files"]
    files["config.json"]["size"] = len(text)
    edit_manifest(kept, files=files)
    assert "its tensors are not those of this model" in refusal(kept)


def test_a_file_of_another_model_is_refused(kept: Path) -> None:
    shared, experts = kept / "shared.safetensors", kept / "experts-000.safetensors"
    shutil.copy(experts, shared)
    weights = json.loads((kept / MANIFEST_FILE).read_text())["weights"]
    weights["shared.safetensors"] = weights["experts-000.safetensors"]
    edit_manifest(kept, weights=weights)
    assert "its tensors are not those of this model" in refusal(kept)


def test_a_changed_manifest_is_found_by_its_own_hash(kept: Path) -> None:
    path = kept / MANIFEST_FILE
    path.write_text(path.read_text().replace('"nf4"', '"fp4"'))
    assert "mixchat.json: damaged (its SHA-256 differs)" in refusal(kept)


def test_another_format_says_what_to_do(kept: Path) -> None:
    edit_manifest(kept, format=99)
    with pytest.raises(CheckpointError, match="format 99") as caught:
        read_manifest(kept)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"source": None},
        {"source": {"repo": "x", "surprise": 1}},
        {"source": {"repo": 5}},
        {"source": {"repo": "x", "commit": 5}},
        {"quantization": {}},
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"../a": {"size": 1, "sha256": ""}}},
        {"files": {"a/b": {"size": 1, "sha256": ""}}},
        {"files": {"a": {"size": "1", "sha256": ""}}},
        {"files": {"a": {"size": 1, "sha256": None}}},
        {"weights": None},
        {"weights": {"a": 1}},
        {"weights": {"a": {"size": 1, "sha256": ""}}},
        {"weights": {"a": {"size": 1, "sha256": {"x": 1}}}},
        {"weights": {"../a": {"size": 1, "sha256": {}}}},
        {"weights": {"a": {"size": True, "sha256": {}}}},
    ],
)
def test_a_malformed_manifest_is_refused(kept: Path, changes: dict[str, Any]) -> None:
    edit_manifest(kept, **changes)
    assert MANIFEST_FILE in refusal(kept)


@pytest.mark.parametrize(
    ("key", "value"), [("quant_type", "int2"), ("layout", []), ("blocksize", 128), ("head", 1)]
)
def test_an_unknown_quantization_is_refused(kept: Path, key: str, value: object) -> None:
    quantization = json.loads((kept / MANIFEST_FILE).read_text())["quantization"]
    edit_manifest(kept, quantization={**quantization, key: value})
    assert key in refusal(kept)


def test_a_model_in_fp4_opens(kept: Path) -> None:
    quantization = json.loads((kept / MANIFEST_FILE).read_text())["quantization"]
    edit_manifest(kept, quantization={**quantization, "quant_type": "fp4"})
    with InstalledModel(kept) as model:
        assert model.blueprint.expert.w13.quant_type == "fp4"
        assert model.blueprint.gate(0).dtype == model.blueprint.quantization.dtype


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "null"])
def test_a_manifest_that_is_no_object_is_refused(kept: Path, text: str) -> None:
    (kept / MANIFEST_FILE).write_text(text)
    assert MANIFEST_FILE in refusal(kept)
