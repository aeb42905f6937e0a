"""A download that was cut off, and the next one: it resumes, or starts again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, REPO, FakeHub
from safetensors.torch import load_file, save_file
from weight_tools import NF4, Meter, files_of, get, shard_names

from mixchat.base.errors import HubError, ModelNotFoundError
from mixchat.install.make import download
from mixchat.install.make.download import DownloadRequest, plan_download
from mixchat.install.make.quantize_options import QuantizeOptions
from mixchat.install.models import resolve
from mixchat.install.source import hub
from mixchat.weights.format.journal import JOURNAL_FILE
from mixchat.weights.format.manifest import is_installed, read_manifest
from mixchat.weights.format.workspace import MODEL_DIR, workspace

pytestmark = pytest.mark.usefixtures("home")
SHARDS = shard_names(2)


def test_a_failed_download_leaves_what_came_and_the_next_one_resumes(fake, home, made, making):
    fail_second(fake)
    with pytest.raises(HubError):
        get(REPO)
    target = home / "models" / "org--tiny-mixtral"
    assert (workspace(target) / JOURNAL_FILE).exists()
    assert not is_installed(target)
    assert not (home / "models" / ".org--tiny-mixtral.mixchat.lock").exists()
    done = list(making.names)
    fake.faults.clear()
    meter = Meter()
    assert files_of(get(REPO, meter=meter)) == files_of(made)
    assert not set(done) & set(making.names[len(done) :])
    assert meter.notes == []


def test_a_shard_that_is_used_up_is_neither_planned_nor_requested_again(fake):
    """A resumed download announced all shards, and measured the hub's rate on the first."""
    cut_off(fake)
    fake.requests.clear()
    made = plan_download(DownloadRequest(resolve(REPO), NF4), Meter())
    assert made is not None
    assert made.fetch == len(fake.files[SHARDS[1]])
    get(REPO)
    ranges = {r.range for r in fake.requests if r.path == f"/{SHARDS[0]}"}
    assert ranges == {f"bytes=0-{hub._FIRST_READ_BYTES - 1}"}  # its header


def test_it_resumes_the_commit_it_started_with_though_the_branch_moved(fake):
    cut_off(fake)
    fake.history, fake.commit = {COMMIT}, "d" * 40
    meter = Meter()
    assert read_manifest(get(REPO, meter=meter)).source.commit == COMMIT
    assert meter.bar("quantizing").first > 0


def test_it_starts_again_where_the_hub_has_forgotten_that_commit(fake):
    cut_off(fake)
    fake.commit = "d" * 40
    meter = Meter()
    assert read_manifest(get(REPO, meter=meter)).source.commit == "d" * 40
    assert meter.bar("quantizing").first == 0
    assert len(meter.notes) == 1


@pytest.mark.parametrize(
    "before",
    [
        QuantizeOptions(attention=4),
        QuantizeOptions(scales="absmax"),  # scales are not mixed
    ],
)
def test_with_other_options_it_starts_again_but_for_the_shards_that_are_there(fake, made, before):
    cut_off(fake, options=before)
    meter = Meter()
    assert files_of(get(REPO, meter=meter)) == files_of(made)
    assert meter.bar("quantizing").first == 0
    assert "starting again" in meter.notes[0]


def test_under_its_own_key_it_needs_no_other_name(fake, made):
    cut_off(fake, key="mine")
    assert files_of(get("mine")) == files_of(made)


def test_an_unfinished_key_of_which_nothing_is_known_has_to_be_removed(home):
    place = workspace(home / "models" / "half")
    place.mkdir(parents=True)
    (place / JOURNAL_FILE).write_text("damaged")
    with pytest.raises(ModelNotFoundError, match="unfinished") as caught:
        get("half")
    assert "mixchat rm half" in (caught.value.hint or "")


def test_work_of_another_download_is_removed(fake, home):
    place = workspace(home / "models" / "org--tiny-mixtral")
    (place / MODEL_DIR).mkdir(parents=True)
    (place / MODEL_DIR / "experts-099.safetensors").write_bytes(b"half")
    (place / JOURNAL_FILE).write_text('{"base": null}\n')
    assert not (get(REPO) / "experts-099.safetensors").exists()
    assert not place.exists()


def test_a_directory_that_changed_meanwhile_starts_again(
    two_shards, tmp_path, making, save_each_part
):
    checkpoint = Path(shutil.copytree(two_shards, tmp_path / "tiny"))
    making.fail_at = 8
    with pytest.raises(ConnectionError):
        get(str(checkpoint))
    making.again()
    path = checkpoint / SHARDS[0]
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    meter = Meter()
    installed = get(str(checkpoint), meter=meter)
    assert meter.bar("quantizing").first == 0
    assert files_of(installed) == files_of(get(str(checkpoint), key="again")) | {
        name: (installed / name).read_bytes() for name in ("mixchat.json", "mixchat.copy.json")
    }


def cut_off(fake: FakeHub, **how: Any) -> None:
    """Begin a download that gets only the first shard."""
    fail_second(fake)
    with pytest.raises(HubError):
        get(REPO, **how)
    fake.faults.clear()


def fail_second(fake: FakeHub) -> None:
    """Whoever wants all of the second shard is refused; its header may be read."""
    fake.fail(f"^/{SHARDS[1]}$", after=1, status=403)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        (QuantizeOptions(), True),
        (QuantizeOptions(attention=4), True),
        (QuantizeOptions(head=16), True),
        (QuantizeOptions(attention=16), False),
        (QuantizeOptions("trellis3"), False),
        (QuantizeOptions("none"), False),
        (QuantizeOptions(head=4), False),
        (QuantizeOptions(head=8), False),
    ],
)
def test_what_is_missing_of_a_model_in_4_bits_is_not_passed_over(options, fits):
    """One that came quantized was taken as made in any way, whatever was asked of it."""
    made = {"scales": "given", "quant_type": "nf4", "attention": "nf4", "head": "none"}
    assert download._made_as(DownloadRequest(resolve(REPO), options), made) == fits
