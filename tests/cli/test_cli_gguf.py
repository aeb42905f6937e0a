"""A model in GGUF goes through the commands: planned, downloaded, asked, mended, calibrated."""

import json
from pathlib import Path

import gguf_files
import pytest
from fake_hub import REPO, FakeHub
from plan_tools import SPEEDS
from test_cli_families import flip_tensor
from weight_tools import files_of

from mixchat.planning import measuring

NAME = f"{REPO}:Q8_0"


@pytest.fixture(scope="module")
def file(make_checkpoint, tmp_path_factory):
    shape = {"vocab_size": 262, "moe_intermediate_size": 128, "max_position_embeddings": 512}
    checkpoint = make_checkpoint(model_type="qwen3_moe", **shape)
    return gguf_files.write(checkpoint, tmp_path_factory.mktemp("f") / "tiny-Q8_0.gguf", "Q8_0")


@pytest.fixture
def hub(cache, file, monkeypatch):
    with FakeHub({file.name: file.read_bytes(), "tiny-F16.gguf": b"GGUF" * 900}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_a_kind_on_the_hub_is_planned_installed_and_asked(run, hub, file, environment, monkeypatch):
    monkeypatch.setattr(measuring, "take_speeds", lambda *given: SPEEDS)
    said = run("download", REPO, code=2).said
    assert "has several models in GGUF" in said
    assert "F16, Q8_0" in said
    planned = json.loads(run("download", NAME, "--dry-run", "--json").out)
    assert planned["fetch_bytes"] == file.stat().st_size
    assert json.loads(run("plan", NAME, "--json", "--device", "cpu").out)["kept_bytes"]
    run("download", NAME, "--name", "mine")
    installed = Path(environment["MIXCHAT_HOME"]) / "models" / "mine"
    whole = files_of(installed)
    question = ("run", "Hi", "-m", "mine", "--temp", "0", "--json", "--device", "cpu", "-n", "8")
    assert json.loads(run(*question).out)["ids"]
    flip_tensor(installed / "experts-001.safetensors", "2.w2.codes")
    (installed / "tokenizer.json").write_text("damaged")
    run("repair", "mine")
    assert files_of(installed) == whole
    assert "mine is calibrated" in run("calibrate", "mine").said
    run("verify", "mine")


@pytest.mark.parametrize("place", ["file", "directory"])
def test_a_file_and_its_directory_give_the_same_model(run, file, environment, place):
    source = file if place == "file" else file.parent
    run("download", source, "--name", "mine")
    shown = json.loads(run("show", "mine", "--json").out)
    assert (shown["model_type"], shown["source"]) == ("qwen3_moe", str(source))
    run("run", "Hi", "-m", file, code=4)
