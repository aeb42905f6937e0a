"""Runs the command line: inside the test, or as a process of its own as a shell does."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_mixchat
import pytest
from command_line import FAKE, Done
from fake_hub import FakeHub
from patience import PATIENCE_S
from plan_tools import GB, SPEEDS
from tiny_tokenizer import write_tokenizer

from mixchat.base.progress import progress_bar

# No model and no config.toml of this machine's is seen by a test.
PLACES = {"MIXCHAT_HOME": "home", "XDG_CONFIG_HOME": "config"}


@pytest.fixture
def environment(tmp_path):
    """The environment of a process: no settings of this machine, a data directory of its own."""
    # Without buffers nothing would show that each piece of an answer is flushed.
    dropped = ("MIXCHAT_", "PYTHONUNBUFFERED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return kept | {key: str(tmp_path / place) for key, place in PLACES.items()}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A whole checkpoint, with a tokenizer and a template, that a test may change."""
    return write_tokenizer(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")))


@pytest.fixture
def fake(cache, checkpoint, monkeypatch):
    """A hub with that checkpoint."""
    with FakeHub({path.name: path.read_bytes() for path in checkpoint.iterdir()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def measured(monkeypatch):
    """A machine with 16 GB, 14.5 of them free, and 500 GB of free disk, that is measured in no
    time; counts how often."""
    calls = []

    def measure(blueprint, *given):
        calls.append(blueprint.expert.stride)
        return SPEEDS

    changes = {
        "mixchat.planning.measuring.take_speeds": measure,
        "mixchat.planning.fitting.free_on": lambda device: int(14.5 * GB),
        "mixchat.planning.fitting.tightest_memory_limit": lambda: None,
        "mixchat.planning.torch_threads.choose_threads": lambda blueprint: None,
        "mixchat.base.machine.total_memory": lambda: 16 * GB,
        "mixchat.base.machine.free_disk": lambda directory: 500 * GB,
        "mixchat.base.machine.OtherPrograms.share": lambda self: 0.0,
    }
    for place, value in changes.items():
        monkeypatch.setattr(place, value)
    return calls


@pytest.fixture
def planned(mixchat):
    """Runs `mixchat plan ARGS`, on the CPU unless they name another device."""

    def planned(*arguments):
        device = () if "--device" in arguments else ("--device", "cpu")
        return mixchat("plan", *arguments, *device, fake=False)

    return planned


@pytest.fixture
def process(environment):
    """Runs `mixchat ARGS` with a scripted engine as a process; `shell` is put behind it."""

    def run(*arguments, shell="", stdin=b"", stdout=subprocess.PIPE, **variables):
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *FAKE, *arguments]
        done = subprocess.run(
            command,
            input=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment | variables,
            timeout=PATIENCE_S,
            check=False,
        )
        return Done(done.stdout, done.stderr, done.returncode)

    return run


@pytest.fixture
def calls(monkeypatch):
    """Replaces the download: records the requests and reports progress."""
    made = []

    def download(request, progress, *, announce=None):
        made.append(request)
        with progress_bar(progress, "quantizing", 1000) as task:
            task.advance(1000)
        return request.ref.directory

    monkeypatch.setattr("mixchat.install.make.download.download", download)
    return made


@pytest.fixture
def mixchat(environment, monkeypatch, capsysbinary):
    """Runs `mixchat ARGS` inside the test, with a scripted engine (`fake=False`: without)."""
    from mixchat.cli.app import run as run_app

    def run(*arguments, stdin=b"", fake=True, **variables):
        with monkeypatch.context() as patch:
            for key in [key for key in os.environ if key.startswith("MIXCHAT_")]:
                patch.delenv(key)
            for key in variables | PLACES:
                patch.setenv(key, str((environment | variables)[key]))
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            if fake:
                patch.setattr("mixchat.face.local_models.open_model", fake_mixchat.open_fake)
                patch.setattr(
                    "mixchat.face.local_models.LocalModels.predictor", fake_mixchat.predict_fake
                )
                patch.setattr("mixchat.cli.run.is_served_here", fake_mixchat.is_served)
            with pytest.raises(SystemExit) as ending:
                run_app([os.fsdecode(argument) for argument in arguments])
        said = capsysbinary.readouterr()
        return Done(said.out, said.err, ending.value.code)

    return run


@pytest.fixture
def run(mixchat, monkeypatch):
    """Run a command that has to succeed, and return its standard output and error.

    Calibrating reads short windows.
    """
    from mixchat.loading import calibrate

    monkeypatch.setattr(calibrate, "WINDOW", 32)

    def run(*arguments, code=0, stdin=b""):
        done = mixchat(*map(str, arguments), fake=False, stdin=stdin)
        assert done.returncode == code, (arguments, done.stderr.decode())
        return SimpleNamespace(out=done.stdout.decode(), said=done.stderr.decode())

    return run


@pytest.fixture
def cut_off(run, monkeypatch):
    """Runs a command line with Ctrl-C at the moment when it writes to a file."""
    from mixchat.install.make import build
    from mixchat.install.make.unfinished import ModelWriter

    write = ModelWriter.write

    def cut_off(*arguments, at="experts-001.safetensors"):
        def stopping(self, part, tensors):
            if part.file == at:
                raise KeyboardInterrupt
            return write(self, part, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(ModelWriter, "write", stopping)
            patch.setattr(build, "_SAVE_INTERVAL_S", -1.0)
            return run(*arguments, code=130)

    return cut_off
