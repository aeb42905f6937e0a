"""Shells complete commands, flags and the names of models, by the scripts they are given."""

import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from command_line import PRINT_MODULES
from terminal import Terminal

from mixchat.chat.saved.chat_file import SavedChat
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.cli.flags.shell_completion import COMPLETE_VARIABLE
from mixchat.weights.known_models import KNOWN

HEAVY = {"torch", "rich", "huggingface_hub", "numpy"}
BASH = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mixchat_completion mixchat
printf '%s\\n' "${COMPREPLY[@]}"
"""
COMMANDS = {"run", "download", "list", "show", "verify", "rm", "plan", "config"}


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
def installed(shell_environment):
    """Has a shell install its completion, as a person does; skips where there is no such shell."""

    def install(shell, *flags):
        if shutil.which(shell, path=shell_environment["PATH"]) is None:
            pytest.skip(f"there is no {shell}")
        # The `true` keeps the shell from giving its place to mixchat, which then would see none.
        command = [shell, *flags, "-c", "mixchat --install-completion; true"]
        done = subprocess.run(
            command, env=shell_environment, capture_output=True, text=True, timeout=60
        )
        assert (done.stderr, done.returncode) == ("", 0)
        return shell_environment

    return install


@pytest.fixture
def bash(installed):
    """A function that lets bash complete words, the last of them being begun."""
    environment = installed("bash", "--norc")

    def complete(*words):
        script = Path(environment["HOME"], ".bash_completions", "mixchat.sh").read_text() + BASH
        command = ["bash", "--norc", "-c", script, "bash", "mixchat", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.stdout.split()

    return complete


def test_bash_completes_commands_and_flags(bash):
    assert set(bash("")) >= COMMANDS
    assert bash("ver") == ["verify"]
    assert bash("run", "--temp") == ["--temp", "--temperature"]
    assert bash("run", "--temp", "0.2", "--temp") == []
    assert "--install-completion" in bash("--")


@pytest.mark.parametrize("command", ["stats", "plan", "bench", "download"])
def test_bash_completes_models_for_every_command_that_takes_one(bash, command):
    assert set(bash(command, "")) == {*KNOWN, "demo", "mine", "someone--tune"}


@pytest.mark.parametrize("command", ["show", "verify", "repair", "convert", "calibrate", "rm"])
def test_bash_completes_installed_models_alone_for_a_command_that_needs_one(bash, command):
    """After rm, models were offered that nobody had installed."""
    assert bash(command, "") == ["mine", "someone--tune"]


def test_bash_completes_the_values_of_flags(bash):
    assert bash("run", "-m", "mi") == ["mine"]
    assert bash("run", "-s", "'Be brief'", "--model", "d") == ["demo"]
    assert bash("plan", "--device", "") == ["cpu", "cuda"]
    assert bash("run", "--cache-policy", "l") == ["layered", "lru"]
    assert bash("download", "demo", "--expert-bits", "") == ["16", "4", "3", "2"]
    assert bash("run", "--trace", "/etc/h") == []  # bash itself then completes files


@pytest.fixture
def chats(tmp_path):
    """Two chats with names, one of which a shell would act on, and one without."""
    store = ChatStore(tmp_path / "home" / "chats")
    for tail, name in (("aaa", "Holiday plans"), ("bbb", "$(touch x) `y`; z"), ("ccc", None)):
        began = datetime(2026, 11, 25, tzinfo=timezone.utc)
        store.save(
            SavedChat(f"20261125-0000-{tail}", name, "demo", "x", began, began, None, {}, ())
        )


def test_bash_completes_chats_by_name_and_by_id(bash, chats):
    """Only IDs were offered, which nobody remembers."""
    ids = [f"20261125-0000-{tail}" for tail in ("ccc", "bbb", "aaa")]
    assert bash("chats", "") == ["Holiday\\", "plans", *ids]  # one word, its space escaped
    assert bash("run", "--resume", "2026") == ids
    assert bash("run", "-r", "Holiday\\ pl") == ["Holiday\\", "plans"]
    assert bash("chats", "--rm", '"Holiday pl') == ["Holiday", "plans"]


def test_a_person_at_bash_gets_the_completion_where_the_cursor_is(installed, chats):
    environment = installed("bash", "--norc")
    with Terminal(["bash", "-i"], environment | {"PS1": "$ "}) as terminal:
        terminal.type("mixchat chats Hol\t")  # a name with a space
        terminal.wait_for(r"iday\ plans ")
        terminal.type("\x15mixchat chats 'Holiday p\t")
        terminal.wait_for("lans' ")
        terminal.type("\x15mixchat sho\t")
        terminal.wait_for("show ")


def test_the_script_is_shown_as_it_is_installed(installed):
    environment = installed("bash", "--norc")
    command = ["bash", "--norc", "-c", "mixchat --show-completion; true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    script = Path(environment["HOME"], ".bash_completions", "mixchat.sh").read_text()
    assert done.stdout.strip() == script.strip()


def test_installing_twice_leaves_the_same(installed):
    def files():
        return {path: path.read_bytes().rstrip() for path in home.rglob("*") if path.is_file()}

    home = Path(installed("bash", "--norc")["HOME"])
    once = files()
    installed("bash", "--norc")
    assert files() == once


@pytest.mark.parametrize("found", [None, ("tcsh", "/bin/tcsh")])
@pytest.mark.parametrize("flag", ["--install-completion", "--show-completion"])
def test_a_shell_that_is_not_known_is_said(mixchat, monkeypatch, flag, found):
    import shellingham

    def detect_shell():
        if found is None:
            raise shellingham.ShellDetectionFailure
        return found

    monkeypatch.setattr(shellingham, "detect_shell", detect_shell)
    done = mixchat(flag)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b": only in bash, zsh, fish\n" in done.stderr


def completing(environment, *words, code=None):
    """Completes the last of the words as bash's script does."""
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = ["-c", code] if code else ["-m", "mixchat"]
    return subprocess.run(
        [sys.executable, *command],
        env=environment | asked | {COMPLETE_VARIABLE: "complete_bash"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("words", [["ru"], ["run", "-m", "m"], ["run", "--te"], ["rm", ""]])
def test_completing_loads_nothing_heavy(shell_environment, words):
    done = completing(shell_environment, "mixchat", *words, code=PRINT_MODULES)
    assert done.stdout
    loaded = set(done.stderr.split())
    assert not HEAVY & loaded
    assert not {"pygments", "markdown_it"} & loaded


@pytest.mark.parametrize(
    "words", [["nonsense", ""], ["run", "--nonsense", ""], ["run", "--temp", "hot", "--s"]]
)
def test_wrong_words_before_do_no_harm(shell_environment, words):
    assert completing(shell_environment, "mixchat", *words).stderr == ""


def test_where_no_model_can_be_listed_there_are_still_names(environment, tmp_path):
    (tmp_path / "home").write_text("a file where the directory belongs")
    done = completing(environment, "mixchat", "download", "")
    assert done.stdout.split() == [*KNOWN, "demo"]
    assert completing(environment, "mixchat", "show", "").stdout.split() == []


def test_a_damaged_file_of_settings_does_not_keep_from_completing(shell_environment, tmp_path):
    (tmp_path / "config.toml").write_text("[")
    variables = shell_environment | {"MIXCHAT_CONFIG": str(tmp_path / "config.toml")}
    assert completing(variables, "mixchat", "run", "-m", "mi").stdout == "mine\n"
