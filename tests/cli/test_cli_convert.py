"""`convert`."""

import errno
import shutil
from pathlib import Path

import pytest

from mixchat.base.lock import exclusive_lock
from mixchat.weights.care import convert as convert_module
from mixchat.weights.make.writer import ModelWriter

FILES = ("shared.safetensors", "experts-000.safetensors", "experts-001.safetensors")


@pytest.fixture(scope="module")
def both(tiny_checkpoint, install):
    layouts = ("bitsandbytes", "cpu-packed")
    return {layout: install(tiny_checkpoint, layout=layout) for layout in layouts}


@pytest.fixture
def installed(both, environment):
    models = Path(environment["MIXCHAT_HOME"]) / "models"
    models.mkdir(parents=True)
    return Path(shutil.copytree(both["bitsandbytes"], models / "mine"))


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def stop_at(patch, name, error):
    """Stops at the first part of a file."""
    write = ModelWriter.write

    def stopping(writer, part, tensors):
        if part.file == name:
            raise error
        return write(writer, part, tensors)

    patch.setattr(ModelWriter, "write", stopping)


def lines_of(done):
    return done.stderr.decode().splitlines()


def test_into_the_layout_asked_for(mixchat, installed, both):
    done = mixchat("convert", "mine", "--layout", "cpu-packed")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert lines_of(done)[-1] == "mine has the layout cpu-packed now"
    assert same(installed, both["cpu-packed"])
    assert mixchat("verify", "mine").returncode == 0
    assert b"layout             cpu-packed\n" in mixchat("show", "mine").stdout


def test_already_so_is_said_in_one_line(mixchat, installed, both):
    done = mixchat("convert", "mine", "--layout", "bitsandbytes")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert lines_of(done) == ["mine has the layout bitsandbytes already"]
    assert same(installed, both["bitsandbytes"])


@pytest.mark.parametrize("best", ["bitsandbytes", "cpu-packed"])
def test_without_a_layout_it_is_the_one_for_this_machine(
    mixchat, installed, both, monkeypatch, best
):
    monkeypatch.setattr(convert_module, "best_layout", lambda: best)
    assert mixchat("convert", "mine").returncode == 0
    assert same(installed, both[best])


def test_cut_off_it_is_as_before_and_the_same_command_resumes(
    mixchat, installed, both, monkeypatch
):
    """It could not run before the conversion was finished."""
    with monkeypatch.context() as patch:
        stop_at(patch, FILES[2], KeyboardInterrupt())
        stopped = mixchat("convert", "mine", "--layout", "cpu-packed")
        assert stopped.returncode == 130
        assert lines_of(stopped)[-1] == "interrupted; the same command resumes"
    assert same(installed, both["bitsandbytes"])
    assert b"nf4" in mixchat("list").stdout
    done = mixchat("convert", "mine", "--layout", "cpu-packed")
    assert lines_of(done)[0].startswith("converting takes ")
    assert lines_of(done)[-1] == "mine has the layout cpu-packed now"
    assert same(installed, both["cpu-packed"])


def test_a_full_disk_is_one_clear_line(mixchat, installed, monkeypatch):
    stop_at(monkeypatch, FILES[2], OSError(errno.ENOSPC, "No space left on device"))
    done = mixchat("convert", "mine", "--layout", "cpu-packed")
    assert done.returncode == 7
    assert any(line.startswith("error: the disk is full") for line in lines_of(done))


def test_damage_is_named(mixchat, installed):
    data = bytearray((installed / FILES[1]).read_bytes())
    data[-5000] ^= 1
    (installed / FILES[1]).write_bytes(data)
    done = mixchat("convert", "mine", "--layout", "cpu-packed")
    assert done.returncode == 6
    assert f"{FILES[1]}: 3.w2.codes is damaged" in done.stderr.decode()
    assert (installed / FILES[1]).read_bytes() == data


def test_nothing_in_4_bits_is_refused(mixchat, installed, tiny_checkpoint, install):
    shutil.copytree(install(tiny_checkpoint, quant_type="none"), installed.parent / "dense")
    for flags in ((), ("--dense-bits", "8")):
        done = mixchat("convert", "dense", *flags)
        assert done.returncode == 2
        (line,) = lines_of(done)
        assert line == "error: 'dense' has no experts in 3 or 4 bits: there is nothing to convert"


def test_16_bits_become_8_which_is_said_to_be_final(
    mixchat, installed, both, tiny_checkpoint, install
):
    made = install(tiny_checkpoint, layout="bitsandbytes", attention=16, head=16)
    shutil.copytree(made, installed.parent / "wide")
    done = mixchat("convert", "wide", "--dense-bits", "attention=8")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert lines_of(done)[-1] == "wide has 8 bits in attention now: that cannot be undone"
    done = mixchat("convert", "wide", "--dense-bits", "8", "--layout", "cpu-packed")
    assert lines_of(done)[-2:] == [
        "wide has 8 bits in head now: that cannot be undone",
        "wide has the layout cpu-packed now",
    ]
    assert same(installed.parent / "wide", both["cpu-packed"])
    done = mixchat("convert", "wide", "--dense-bits", "8")
    assert lines_of(done) == ["wide has the requested bits already"]
    assert mixchat("verify", "wide").returncode == 0


@pytest.mark.parametrize("bits", ["16", "4", "head=16", "attention=8,head=4"])
def test_8_bits_stay_8(mixchat, installed, both, bits):
    done = mixchat("convert", "mine", "--dense-bits", bits)
    error, hint = lines_of(done)
    assert done.returncode == 2
    assert error.endswith("has 8 bits: only 16 can be converted, and only to 8, 6 or 5")
    assert hint.startswith("hint: Download the model again")
    assert same(installed, both["bitsandbytes"])


def test_one_in_use_is_refused(mixchat, installed):
    with exclusive_lock(installed):
        assert mixchat("convert", "mine").returncode == 2


@pytest.mark.parametrize("arguments", [["mine", "--layout", "gguf"], ["mine", "--layout"]])
def test_wrong_use_changes_nothing(mixchat, installed, both, arguments):
    assert mixchat("convert", *arguments).returncode == 2
    assert same(installed, both["bitsandbytes"])
