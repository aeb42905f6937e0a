"""`mixchat pull`, `ls` and `help`, as people type them who come from other programs."""


def test_ls_and_pull_are_list_and_download(mixchat):
    assert mixchat("ls", "--json").stdout == mixchat("list", "--json").stdout == b"[]\n"
    pulled, downloaded = mixchat("pull", "nosuch"), mixchat("download", "nosuch")
    assert (pulled.stderr, pulled.returncode) == (downloaded.stderr, 4)


def test_help_of_a_command_is_that_of_its_flag(mixchat):
    for command in ((), ("run",)):
        done = mixchat("help", *command)
        assert done.stdout == mixchat(*command, "--help").stdout
        assert (done.stderr, done.returncode) == (b"", 0)
    done = mixchat("help", "rum")
    assert (done.stderr, done.returncode) == (mixchat("rum").stderr, 2)


def test_the_list_of_commands_has_each_once_and_the_other_names_in_a_line(mixchat):
    lines = mixchat("--help").stdout.decode().splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line.split()}
    assert not {"pull", "ls", "help"} & listed
    assert lines[-1] == "  Other names: pull for download, ls for list, help [COMMAND] for --help."
