"""Shells complete commands, flags and the names of models, by the scripts they are given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_files import chat_of
from command_line import PRINT_MODULES
from patience import PATIENCE_S

from mixchat.chat.saved.chat_store import ChatStore
from mixchat.install.known_models import KNOWN

HEAVY = {"torch", "rich", "huggingface_hub", "numpy"}
BASH = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mixchat_completion mixchat
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def shell_environment(environment, tmp_path):
    """The environment of a shell that finds this mixchat, in a home of its own, with two models."""
    for name in ("mine", "someone--tune"):
        (tmp_path / "home" / "models" / name).mkdir(parents=True)
        (tmp_path / "home" / "models" / name / "mixchat.json").write_text("{}")
    (tmp_path / "home" / "models" / ".bench-1").mkdir()
    (tmp_path / "home" / "models" / "notes").mkdir()
    person = tmp_path / "person"
    person.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    dropped = {"XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR", "BASH_ENV", "ENV"}
    kept = {key: value for key, value in environment.items() if key not in dropped}
    return kept | {"HOME": str(person), "PATH": path}


@pytest.fixture
def bash(shell_environment):
    """Let bash install its completion, as a person does, and complete words, of which the last is
    begun."""
    if shutil.which("bash", path=shell_environment["PATH"]) is None:
        pytest.skip("there is no bash")

    def run(code, *words):
        command = ["bash", "--norc", "-c", code, "bash", *words]
        done = subprocess.run(
            command, env=shell_environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout.split()

    # The `true` keeps the shell from giving its place to mixchat, which then would see none.
    run("mixchat --install-completion; true")
    script = Path(shell_environment["HOME"], ".bash_completions", "mixchat.sh").read_text() + BASH
    return lambda *words: run(script, "mixchat", *words)


def test_bash_completes_commands_flags_models_and_values(bash):
    """After rm, models were offered that nobody had installed."""
    assert {"run", "download", "list", "show", "verify", "rm", "plan", "config"} <= set(bash(""))
    assert bash("run", "--temp") == ["--temp", "--temperature"]
    assert set(bash("plan", "")) == {*KNOWN, "demo", "mine", "someone--tune"}
    assert bash("rm", "") == ["mine", "someone--tune"]
    assert bash("run", "-s", "'Be brief'", "--model", "d") == ["demo"]
    assert bash("run", "--think", "o") == ["on", "off"]
    assert bash("run", "--prompt-cache", "/etc/h") == []  # bash itself then completes files


@pytest.fixture
def chats(tmp_path):
    """Two chats with names, one of which a shell would act on, and one without."""
    store = ChatStore(tmp_path / "home" / "chats")
    for tail, name in (("aaa", "Holidays"), ("bbb", "$(touch x) `y`; z"), ("ccc", None)):
        store.save(chat_of(f"20261125-0000-{tail}", name=name))


def test_bash_completes_chats_by_name_and_by_id(bash, chats):
    """A name of several words is left out, because bash would take it for several."""
    ids = [f"20261125-0000-{tail}" for tail in ("ccc", "bbb", "aaa")]
    assert bash("chats", "") == ["Holidays", *ids]
    assert bash("run", "--resume", "2026") == ids
    assert bash("run", "-r", "Holi") == ["Holidays"]


def completing(environment, *words, code=None):
    """Completes the last of the words as bash's script does."""
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = ["-c", code] if code else ["-m", "mixchat"]
    return subprocess.run(
        [sys.executable, *command],
        env=environment | asked | {"_MIXCHAT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("words", [["run", "--te"], ["rm", ""]])
def test_completing_loads_nothing_heavy(shell_environment, words):
    done = completing(shell_environment, "mixchat", *words, code=PRINT_MODULES)
    assert done.stdout
    loaded = set(done.stderr.split())
    assert not HEAVY & loaded
    assert not {"pygments", "markdown_it"} & loaded


def test_a_damaged_file_of_settings_does_not_keep_from_completing(shell_environment, tmp_path):
    (tmp_path / "config.toml").write_text("[")
    variables = shell_environment | {"MIXCHAT_CONFIG": str(tmp_path / "config.toml")}
    assert completing(variables, "mixchat", "run", "-m", "mi").stdout == "mine\n"
