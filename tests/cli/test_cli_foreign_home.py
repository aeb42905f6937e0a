"""Each command with a data directory that belongs to another user."""

import os
import shutil
import subprocess
import sys

import pytest
from patience import PATIENCE_S

WITHOUT_RIGHTS = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search,-fowner",
    "--inh-caps=-all",
)
COMMANDS = (
    *("list", "gc", "chats", "chats x", "config", "stats", "run -m demo Hi", "bench demo"),
    *(f"{name} demo" for name in ("show", "verify", "repair", "rm --yes", "plan", "download")),
    *("calibrate demo", "serve -m demo --port 0"),
)
READABLE = ("list", "chats", "run -m demo Hi", "show demo", "rm --yes demo")


@pytest.fixture
def user():
    """The beginning of a command line that takes root's rights away."""
    if os.geteuid() != 0:
        return ()
    if not shutil.which("setpriv") or subprocess.run([*WITHOUT_RIGHTS, "true"]).returncode:
        pytest.skip("root may read everything here")
    return WITHOUT_RIGHTS


@pytest.mark.parametrize(
    ("command", "mode"),
    [*((command, 0o000) for command in COMMANDS), *((command, 0o555) for command in READABLE)],
)
def test_a_data_directory_of_another_user_is_one_clear_line(
    user, environment, tmp_path, command, mode
):
    """`list` said that there are no models, and others named a file without what to do."""
    home = tmp_path / "home"
    for name in ("models", "chats", "stats"):
        (home / name).mkdir(parents=True)
        (home / name).chmod(0o000)
    home.chmod(mode)
    if user:
        os.chown(home, 12345, 12345)
        for path in home.iterdir():
            os.chown(path, 12345, 12345)
    done = subprocess.run(
        [*user, sys.executable, "-m", "mixchat", *command.split()],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    home.chmod(0o700)
    for path in home.iterdir():
        path.chmod(0o700)
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert error.endswith("Permission denied")
    assert str(home) in error
    assert hint.startswith("hint: Set MIXCHAT_HOME to a directory that ")
    assert (done.returncode, done.stdout) == (2, "")
