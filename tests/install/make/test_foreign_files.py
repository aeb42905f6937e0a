"""Files in a model's directory that mixchat did not write stay, whatever is made next to them."""

import shutil
from pathlib import Path

import pytest
from fake_hub import REPO
from weight_tools import FOREIGN, Meter, files_of, get, write_files

from mixchat.base.errors import UsageError
from mixchat.base.machine import disk_usage
from mixchat.install.make.download import DownloadRequest, plan_download
from mixchat.install.make.quantize_options import QuantizeOptions
from mixchat.install.models import resolve
from mixchat.weights.format.blueprint import SHARED_FILE, experts_file
from mixchat.weights.format.manifest import is_installed
from mixchat.weights.format.own_files import own_bytes, own_files

pytestmark = pytest.mark.usefixtures("home")


def test_a_download_leaves_them_and_names_them(fake, made, home):
    """A thesis.txt in the directory was removed before the download began."""
    target, meter = write_files(home / "models" / "org--tiny-mixtral", FOREIGN), Meter()
    assert get(REPO, meter=meter) == target
    assert files_of(target) == files_of(made) | FOREIGN
    (note,) = [note for note in meter.notes if "thesis.txt" in note]
    assert str(target) in note


def test_a_download_with_other_options_removes_the_work_and_nothing_else(
    fake, home, making, save_each_part
):
    target = write_files(home / "models" / "org--tiny-mixtral", FOREIGN)
    making.fail_at = 4
    with pytest.raises(ConnectionError):
        get(REPO)
    making.fail_at = None
    meter = Meter()
    get(REPO, options=QuantizeOptions(attention=16, head=16), meter=meter)
    assert is_installed(target)
    assert any("starting again" in note for note in meter.notes)
    assert {name: data for name, data in files_of(target).items() if name in FOREIGN} == FOREIGN


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_download_refuses_to_overwrite_a_checkpoint_under_its_name(fake, home, dry_run):
    files = {"config.json": b"mine", "notes": b""}
    target = write_files(home / "models" / "org--tiny-mixtral", files)
    before = files_of(home)
    request = DownloadRequest(resolve(REPO), QuantizeOptions())
    with pytest.raises(UsageError, match=r"config\.json") as caught:
        plan_download(request, Meter()) if dry_run else get(REPO)
    assert "notes" not in str(caught.value)
    assert "--name" in (caught.value.hint or "")
    assert files_of(home) == before
    assert files_of(target)["config.json"] == b"mine"


def test_a_checkpoint_in_models_is_not_replaced_by_the_model_made_of_it(tiny_checkpoint, home):
    """Its directory is the one in which its model would be installed."""
    mine = Path(shutil.copytree(tiny_checkpoint, home / "models" / "mine"))
    with pytest.raises(UsageError, match="did not write"):
        get(str(mine))
    assert files_of(mine) == files_of(tiny_checkpoint)
    assert is_installed(get(str(mine), key="other"))
    assert files_of(mine) == files_of(tiny_checkpoint)


def test_foreign_bytes_do_not_count_as_work_that_is_done(fake, home):
    """A directory with 1 GB of notes was planned to need 1 GB less of disk."""
    request = DownloadRequest(resolve(REPO), QuantizeOptions())
    alone = plan_download(request, Meter())
    target = write_files(home / "models" / "org--tiny-mixtral", {"notes": b"x" * 1_000_000})
    assert own_bytes(target) == 0 < disk_usage(target)
    planned = plan_download(request, Meter())
    assert alone is not None
    assert planned is not None
    assert planned.disk[0].needed == alone.disk[0].needed


def test_a_model_consists_of_own_files_alone(made):
    names = {path.name for path in own_files(made)}
    assert names == {*files_of(made)}
    assert {SHARED_FILE, experts_file(0), "config.json", "mixchat.json"} <= names
