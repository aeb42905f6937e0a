"""`run` and `bench` take the addresses of workers, and the file of their key."""

import socket
from pathlib import Path

import pytest

from mixchat.base.errors import UsageError

GIVEN = ("--worker", "192.168.1.5", "--worker", "helper:80", "--key-file", "a.key")
TAKEN_BY = {
    "run": "fake_mixchat.open_fake",
    "bench": "mixchat.bench.rounds.Bench",
}


@pytest.mark.parametrize("command", TAKEN_BY)
def test_workers_and_the_key_get_to_those_who_load(
    mixchat, monkeypatch, tiny_model, tmp_path, command
):
    """The key may be below ~, which no shell replaces in --key-file=~/a.key or in a variable."""
    loads = []

    def take(model, load, *others, **options):
        loads.append((load.workers, load.key_file))
        raise UsageError("enough")

    monkeypatch.setattr(TAKEN_BY[command], take)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("Hi",) if command == "run" else (str(tiny_model),)
    for flags, variables in (
        (GIVEN, {}),
        ((), {}),
        (("--key-file=~/a.key",), {}),
        ((), {"MIXCHAT_KEY_FILE": "~/a.key"}),
    ):
        assert mixchat(command, *words, *flags, **variables).stderr == b"error: enough\n"
    both = ("192.168.1.5", "helper:80")
    below_home = ((), tmp_path / "a.key")
    assert loads == [(both, Path("a.key")), ((), None), below_home, below_home]


def test_a_worker_s_key_may_be_below_the_home_directory(mixchat, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mixchat("worker", "--new-key", "--key-file=~/a.key").returncode == 0
    assert (tmp_path / "a.key").exists()
    (tmp_path / "a.key").write_text("")
    said = mixchat("worker", "--key-file=~/a.key").stderr.decode()
    assert said.startswith(f"error: {tmp_path}/a.key: not a key")


@pytest.mark.parametrize("silent", [True, False])
def test_a_worker_that_is_silent_or_gone_at_the_start_is_exit_code_5(
    mixchat, tiny_model, tmp_path, silent
):
    """It was 1, which stands for a fault of mixchat itself."""
    key = tmp_path / "a.key"
    assert mixchat("worker", "--new-key", "--key-file", str(key)).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if not silent:
            listener.close()
        flags = ("--worker", address, "--key-file", str(key))
        done = mixchat("bench", str(tiny_model), "--prompt", "4", "--tokens", "4", *flags)
    assert done.returncode == 5
    reason = "the worker does not answer" if silent else "no worker can be reached there"
    assert done.stderr.decode().startswith(f"error: {address}: {reason}\n")
