"""`calibrate --expert-bits` and `download --expert-bits` with bits between those of the types."""

import shutil
from pathlib import Path

import pytest
from test_cli_calibrate import MODEL, TEXT, contents, lines_of
from tiny_tokenizer import write_tokenizer

from mixchat.install.make.mix import bits_of, forms_of
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import read_manifest
from mixchat.weights.format.workspace import workspace
from mixchat.weights.matrix.linear import TYPES

BITS = "3.7"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    shape = {"vocab_size": 262, "hidden_size": 256, "intermediate_size": 512}
    return write_tokenizer(make_checkpoint(**shape, max_position_embeddings=256))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def models(environment):
    return Path(environment["MIXCHAT_HOME"]) / "models"


def blueprint_of(directory):
    with InstalledModel(directory) as installed:
        return installed.blueprint


def test_a_download_in_mixed_bits_says_what_it_takes_and_calibrates(run, checkpoint, models, text):
    download = ("download", str(checkpoint), "--name", "mine", "--expert-bits", BITS)
    said = run(*download, "--calibrate-text", text).said
    assert "calibrates experts to 3." in said
    assert "the experts get 3." in said
    made = blueprint_of(models / "mine")
    assert 3.5 < bits_of(made) <= 3.7
    assert len({*forms_of(made)}) > 1
    manifest = (models / "mine" / "mixchat.json").read_bytes()
    run("verify", "mine")
    run("run", "-m", "mine", "-n", "3", "hello")
    assert "mixed" in run("list").out
    run(*download)
    assert (models / "mine" / "mixchat.json").read_bytes() == manifest
    other = run(*download[:-1], "4.1", code=2)
    assert "calibrated in other bits" in lines_of(other)[0]


def test_cut_off_it_answers_and_resumes_with_the_same_types(run, cut_off, checkpoint, models, text):
    run("download", str(checkpoint), "--name", "mine")
    whole = shutil.copytree(models / "mine", models / "whole")
    flags = ("--expert-bits", BITS, "--calibrate-text", text)
    run("calibrate", "whole", *flags)
    cut_off("calibrate", "mine", *flags)
    run("verify", "mine")
    run("run", "-m", "mine", "-n", "3", "hello")
    refused = run("calibrate", "mine", "--expert-bits", "4", code=2)
    assert lines_of(refused)[-1].endswith("mixchat calibrate mine --expert-bits 3.7")
    run("calibrate", "mine")
    assert contents(models / "mine", MODEL) == contents(whole, MODEL)
    assert not workspace(models / "mine").exists()


def test_two_bits_give_all_layers_one_type_and_are_always_calibrated(run, checkpoint, models, text):
    download = ("download", str(checkpoint), "--name", "mine", "--expert-bits", "2")
    assert "calibrates experts to 2." in run(*download, "--dry-run").out
    run(*download, "--calibrate-text", text)
    quantization = read_manifest(models / "mine").quantization
    assert TYPES[quantization["quant_type"]].bits == 2
    assert quantization["scales"] == "calibrated"
    assert not blueprint_of(models / "mine").layers
    run("run", "-m", "mine", "-n", "3", "hello")
