"""A disk may change a byte of an unfinished model; the finished one has none of it."""

from pathlib import Path

import pytest
from care_tools import flip, verify
from weight_tools import Meter, fetching, files_of, leave_unfinished, run, shard

from mixchat.base.safetensors import SafetensorsFile
from mixchat.install.make.parts import model_parts
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.make.unfinished import find_damaged
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.workspace import MODEL_DIR, workspace


@pytest.fixture
def checkpoint(small: Path, tmp_path: Path) -> Path:
    return shard(small, tmp_path / "shards", 3)


@pytest.fixture
def unfinished(checkpoint: Path, tmp_path: Path) -> Path:
    """A model that lacks the last shard."""
    leave_unfinished(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def first_made(checkpoint: Path, target: Path) -> tuple[Path, int]:
    """A file of the model, and where the bytes of a tensor in it begin that is made."""
    made, directory = Journal(workspace(target)).made, workspace(target) / MODEL_DIR
    file = next(name for name in made if (directory / name).is_file())
    with SafetensorsFile(directory / file) as opened:
        return directory / file, opened.header.start(next(iter(made[file])))


def test_a_part_with_a_flipped_byte_is_made_again_alone(checkpoint, unfinished, whole, making):
    """It stayed, under the SHA-256 of the right bytes, until somebody ran `verify`."""
    path, start = first_made(checkpoint, unfinished)
    flip(path, start)
    making.again()
    meter = run(fetching(checkpoint, unfinished), unfinished)
    assert any(name.startswith(path.name) for name in making.names)
    assert verify(unfinished) == []
    assert files_of(unfinished) == whole
    assert meter.notes == ["damaged since the last run: 1 tensor; making again"]


def test_it_is_made_again_though_nothing_else_was_left_to_do(small, whole, tmp_path, monkeypatch):
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.delattr("mixchat.install.make.build.Build._finish")
        with pytest.raises(AttributeError):
            run(fetching(small, target), target)
    flip(workspace(target) / MODEL_DIR / "experts-000.safetensors", -1 - 4096)
    again = fetching(small, target)
    run(again, target)
    assert files_of(target) == whole
    assert again.fetched == ["model.safetensors"]


def test_what_is_whole_is_read_once_and_nothing_of_it_is_made_again(
    checkpoint, unfinished, whole, making
):
    before = {
        f"{name} {tensor}"
        for name, made in Journal(workspace(unfinished)).made.items()
        for tensor in made
    }
    making.again()
    meter = run(fetching(checkpoint, unfinished), unfinished)
    assert not before & set(making.names)
    bar = meter.bar("checking")
    assert 0 < bar.done == bar.total
    assert meter.notes == []
    assert files_of(unfinished) == whole


def test_nothing_is_checked_where_nothing_was_done(checkpoint, tmp_path):
    meter = run(fetching(checkpoint, tmp_path / "new"), tmp_path / "new")
    assert not [bar for bar in meter.bars if bar.what.startswith("checking")]


def test_every_tensor_that_is_made_is_checked(checkpoint, unfinished):
    """Each of them is flipped in turn: none goes unseen."""
    made = Journal(workspace(unfinished)).made
    opened = fetching(checkpoint, unfinished)
    blueprint = make_blueprint(opened.index, QuantizeOptions())
    done = [
        (part.file, spec)
        for part in model_parts(blueprint)
        for spec in part.tensors
        if spec.name in made.get(part.file, {})
    ]
    assert len(done) > 5
    for file, spec in done:
        path = workspace(unfinished) / MODEL_DIR / file
        with SafetensorsFile(path) as opened:
            place = opened.header.start(spec.name) + spec.nbytes // 2
        flip(path, place)
        damaged = find_damaged(workspace(unfinished), blueprint.headers(), made, Meter())
        assert damaged == {file: {spec.name}}
        flip(path, place)
