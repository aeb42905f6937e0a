"""`convert`."""

import errno
import shutil
from pathlib import Path

import pytest

from mixchat.base.lock import exclusive_lock
from mixchat.weights.make.unfinished import ModelWriter

FILES = ("shared.safetensors", "experts-000.safetensors", "experts-001.safetensors")
EIGHT = ("--dense-bits", "8")


@pytest.fixture(scope="module")
def both(tiny_checkpoint, install):
    """The tiny model with attention and head in 16 bits and in 8."""
    return {
        "wide": install(tiny_checkpoint, attention=16, head=16),
        "rounded": install(tiny_checkpoint),
    }


@pytest.fixture
def installed(both, environment):
    models = Path(environment["MIXCHAT_HOME"]) / "models"
    models.mkdir(parents=True)
    return Path(shutil.copytree(both["wide"], models / "mine"))


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def stop_at_the_head(patch, error):
    write = ModelWriter.write

    def stopping(writer, part, tensors):
        if part.name == "lm_head.weight":
            raise error
        return write(writer, part, tensors)

    patch.setattr(ModelWriter, "write", stopping)


def lines_of(done):
    return done.stderr.decode().splitlines()


def test_cut_off_it_is_as_before_and_the_same_command_resumes(
    mixchat, installed, both, monkeypatch
):
    """It could not run before the conversion was finished."""
    with monkeypatch.context() as patch:
        stop_at_the_head(patch, KeyboardInterrupt())
        stopped = mixchat("convert", "mine", *EIGHT)
        assert stopped.returncode == 130
        assert lines_of(stopped)[-1] == "interrupted; the same command resumes"
    assert same(installed, both["wide"])
    assert b"nf4" in mixchat("list").stdout
    done = mixchat("convert", "mine", *EIGHT)
    assert lines_of(done)[0].startswith("converting takes ")
    assert same(installed, both["rounded"])


def test_a_full_disk_is_one_clear_line(mixchat, installed, monkeypatch):
    stop_at_the_head(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    done = mixchat("convert", "mine", *EIGHT)
    assert done.returncode == 7
    assert any(line.startswith("error: the disk is full") for line in lines_of(done))


def test_damage_is_named(mixchat, installed):
    data = bytearray((installed / FILES[0]).read_bytes())
    data[-1] ^= 1
    (installed / FILES[0]).write_bytes(data)
    done = mixchat("convert", "mine", *EIGHT)
    assert done.returncode == 6
    assert f"{FILES[0]}: lm_head.weight is damaged" in done.stderr.decode()
    assert (installed / FILES[0]).read_bytes() == data


def test_nothing_in_4_bits_is_refused(mixchat, installed, tiny_checkpoint, install):
    shutil.copytree(install(tiny_checkpoint, quant_type="none"), installed.parent / "dense")
    done = mixchat("convert", "dense", *EIGHT)
    assert done.returncode == 2
    (line,) = lines_of(done)
    assert line == "error: 'dense' has no experts in 3 or 4 bits: there is nothing to convert"


def test_16_bits_become_8_which_is_said_to_be_final(mixchat, installed, both):
    done = mixchat("convert", "mine", "--dense-bits", "attention=8")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert lines_of(done)[-1] == "mine has 8 bits in attention now: that cannot be undone"
    done = mixchat("convert", "mine", *EIGHT)
    assert lines_of(done)[-1] == "mine has 8 bits in head now: that cannot be undone"
    assert same(installed, both["rounded"])
    done = mixchat("convert", "mine", *EIGHT)
    assert lines_of(done) == ["mine has the requested bits already"]
    assert mixchat("verify", "mine").returncode == 0


@pytest.mark.parametrize("bits", ["16", "4", "head=16", "attention=8,head=4"])
def test_8_bits_stay_8(mixchat, installed, both, bits):
    shutil.copytree(both["rounded"], installed.parent / "rounded")
    done = mixchat("convert", "rounded", "--dense-bits", bits)
    error, hint = lines_of(done)
    assert done.returncode == 2
    assert error.endswith("has 8 bits: only 16 can be converted, and only to 8, 6 or 5")
    assert hint.startswith("hint: Download the model again")
    assert same(installed.parent / "rounded", both["rounded"])


def test_one_in_use_is_refused(mixchat, installed):
    with exclusive_lock(installed):
        assert mixchat("convert", "mine", *EIGHT).returncode == 2


@pytest.mark.parametrize("arguments", [[], ["--dense-bits", "7"], ["--dense-bits"]])
def test_wrong_use_changes_nothing(mixchat, installed, both, arguments):
    assert mixchat("convert", "mine", *arguments).returncode == 2
    assert same(installed, both["wide"])
