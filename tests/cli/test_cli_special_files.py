"""A FIFO or a directory in place of a file of a checkpoint or model: a FIFO was waited for."""

import json
import os
import shutil
from pathlib import Path

import pytest

INDEX = "model.safetensors.index.json"
SHARD = "model.safetensors"
SMALL_FILES = (
    "config.json",
    "tokenizer.model",
    "tokenizer.json",
    "added_tokens.json",
    "chat_template.jinja",
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def installed(tiny_model, environment):
    target = Path(environment["MIXCHAT_HOME"]) / "models" / "mine"
    return Path(shutil.copytree(tiny_model, target))


def put_fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "put"),
    [*((name, put_fifo) for name in (*SMALL_FILES, INDEX, SHARD)), (SHARD, put_directory)],
)
def test_a_checkpoint_with_it_is_refused_in_one_line(mixchat, environment, checkpoint, name, put):
    put(checkpoint / name)
    done = mixchat("download", str(checkpoint))
    assert (done.stdout, done.returncode) == (b"", 6)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert not (Path(environment["MIXCHAT_HOME"]) / "models" / "checkpoint").exists()


def test_a_checkpoint_of_links_is_as_good_as_any(mixchat, checkpoint, tmp_path):
    """Hugging Face's cache is made of them."""
    links = tmp_path / "links"
    links.mkdir()
    for path in checkpoint.iterdir():
        (links / path.name).symlink_to(path)
    assert mixchat("download", str(links)).returncode == 0


@pytest.mark.parametrize("name", ["mixchat.json", "config.json"])
@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_a_model_with_a_fifo_is_damaged_and_nobody_waits(mixchat, installed, command, name):
    put_fifo(installed / name)
    done = mixchat(command, *([] if command == "list" else ["mine"]))
    assert done.returncode in (0, 6)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["shared.safetensors", "experts-001.safetensors"])
def test_a_model_whose_weights_are_a_fifo_is_damaged(mixchat, installed, name):
    put_fifo(installed / name)
    done = mixchat("verify", "mine")
    assert done.returncode == 6
    assert name in done.stdout.decode()


@pytest.mark.parametrize("name", ["mixchat.json", "config.json"])
def test_repair_leaves_a_fifo_where_it_is_and_names_it(mixchat, environment, checkpoint, name):
    assert mixchat("download", str(checkpoint)).returncode == 0
    path = Path(environment["MIXCHAT_HOME"]) / "models" / "checkpoint" / name
    put_fifo(path)
    done = mixchat("repair", "checkpoint")
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode in (2, 6)
    assert len(errors) == 1
    assert name in errors[0]
    assert path.is_fifo()


def test_an_unfinished_model_whose_journal_is_a_fifo_is_listed(mixchat, environment):
    unfinished = Path(environment["MIXCHAT_HOME"]) / "models" / ".unfinished.mixchat.unfinished"
    unfinished.mkdir(parents=True)
    put_fifo(unfinished / "journal.jsonl")
    done = mixchat("list", "--json")
    assert [model["problem"] for model in json.loads(done.stdout)] == ["unfinished"]
