"""`mixchat pull`, `ls` and `help`, as people type them who come from other programs."""

import pytest
import typer

from mixchat.cli.app import app


def test_ls_and_pull_are_list_and_download(mixchat):
    assert mixchat("ls", "--json").stdout == mixchat("list", "--json").stdout == b"[]\n"
    pulled, downloaded = mixchat("pull", "nosuch"), mixchat("download", "nosuch")
    assert (pulled.stderr, pulled.returncode) == (downloaded.stderr, 4)


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_help_of_a_command_is_that_of_its_flag(mixchat, name):
    done = mixchat("help", name)
    assert done.stdout == mixchat(name, "--help").stdout
    assert (done.stderr, done.returncode) == (b"", 0)


def test_help_alone_is_that_of_mixchat(mixchat):
    done = mixchat("help")
    assert done.stdout == mixchat("--help").stdout
    assert (done.stderr, done.returncode) == (b"", 0)


def test_the_list_of_commands_has_each_once_and_the_other_names_in_a_line(mixchat):
    lines = mixchat("--help").stdout.decode().splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line.split()}
    assert not {"pull", "ls", "help"} & listed
    assert lines[-1] == "  Other names: pull for download, ls for list, help [COMMAND] for --help."


def test_help_of_no_command_says_what_a_command_line_with_it_says(mixchat):
    done, other = mixchat("help", "rum"), mixchat("rum")
    assert done.stderr == other.stderr
    assert b"there is no command 'rum'" in done.stderr
    assert (done.returncode, other.returncode) == (2, 2)


def test_help_needs_no_config_that_can_be_read(mixchat, tmp_path):
    (tmp_path / "broken.toml").write_text("temp = ")
    done = mixchat("help", "run", MIXCHAT_CONFIG=tmp_path / "broken.toml")
    assert (done.stderr, done.returncode) == (b"", 0)
