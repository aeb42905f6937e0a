"""`run --mcp FILE` lets a model call tools of servers, in scripts and in a terminal."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from command_line import FAKE
from terminal import Terminal

SERVER = str(Path(__file__).parents[1] / "tools" / "mcp_server.py")
CALL = '<tool_call>\n{"name": "echo", "arguments": {"text": "It is noon"}}\n</tool_call>'
SCRIPT = json.dumps([CALL, "Noon."])
pytest.importorskip("mcp")


@pytest.fixture
def servers(tmp_path):
    path = tmp_path / "mcp.json"
    entry = {"command": sys.executable, "args": [SERVER]}
    path.write_text(json.dumps({"mcpServers": {"hand": entry}}))
    return str(path)


@pytest.mark.parametrize(
    ("allow", "told"), [(("--allow", "echo"), "It is noon"), ((), "does not allow")]
)
def test_a_script_runs_only_tools_that_are_allowed(mixchat, servers, tmp_path, allow, told):
    prompts = tmp_path / "prompts"
    arguments = ("run", "-q", "-m", "demo", "--mcp", servers, *allow, "Time?")
    done = mixchat(*arguments, SCRIPT=SCRIPT, PROMPTS=str(prompts), MIXCHAT_CTX_SIZE="8000")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"Noon.\n"
    assert told in prompts.read_text()


def test_a_wrong_file_ends_with_one_line(mixchat, tmp_path):
    done = mixchat("run", "-q", "--mcp", str(tmp_path / "none.json"), "Hi")
    assert done.returncode == 2
    assert b"the file is missing" in done.stderr


def test_a_person_is_asked_before_a_tool_runs(environment, servers):
    command = [*FAKE, "run", "-m", "demo", "--mcp", servers, "--ctx-size", "8000"]
    script = {"SCRIPT": json.dumps([CALL, "Noon.", CALL, "No."])}
    with Terminal(command, environment | script) as terminal:
        terminal.enter("Time?")
        terminal.wait_for("Run echo? [y]es, [a]lways, [N]o:")
        assert "It is noon" in terminal.look()
        terminal.type("y\r")
        terminal.wait_for("[result] It is noon")
        terminal.wait_for("Noon.")
        terminal.enter("And now?")
        terminal.wait_for("Run echo?")
        terminal.type("n\r")
        terminal.wait_for("does not allow")
        terminal.leave()


@pytest.mark.parametrize(("answer", "told"), [("y", "It is noon"), ("n", "does not allow")])
@pytest.mark.parametrize("redirect", ["", " >out"])
def test_a_question_in_a_terminal_asks_too(environment, servers, tmp_path, answer, told, redirect):
    """`run PROMPT --mcp` refused each tool, although a person sat there."""
    words = [*FAKE, "run", "-m", "demo", "--mcp", servers, "--ctx-size", "8000", "Time?"]
    prompts = tmp_path / "prompts"
    script = {"SCRIPT": SCRIPT, "PROMPTS": str(prompts)}
    shell = f"cd {shlex.quote(str(tmp_path))} && {shlex.join(words)}{redirect}"
    with Terminal(["sh", "-c", shell], environment | script) as terminal:
        terminal.wait_for("Run echo? [y]es, [a]lways, [N]o:")
        assert '[tool] echo {"text": "It is noon"}' in terminal.look()
        terminal.type(f"{answer}\r")
        assert terminal.wait_for_end() == 0
    assert told in prompts.read_text()


def test_the_file_of_servers_may_be_named_in_the_config(process, servers, tmp_path):
    config = tmp_path / "config" / "mixchat" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'mcp = {json.dumps(servers)}\nallow = ["echo"]\n')
    prompts = tmp_path / "prompts"
    arguments = ("run", "-q", "-m", "demo", "Time?")
    done = process(*arguments, SCRIPT=SCRIPT, PROMPTS=str(prompts), MIXCHAT_CTX_SIZE="8000")
    assert (done.returncode, done.stdout) == (0, b"Noon.\n")
    assert "It is noon" in prompts.read_text()


def test_no_server_outlives_a_chat_that_is_killed(environment, servers, tmp_path):
    call = CALL.replace("echo", "sleep")
    command = [*FAKE, "run", "-m", "demo", "--mcp", servers, "--allow", "sleep"]
    with Terminal(
        [*command, "--ctx-size", "8000"], environment | {"SCRIPT": json.dumps([call])}
    ) as terminal:
        terminal.enter("Time?")
        terminal.wait_for("[tool] sleep")
        children = Path(f"/proc/{terminal.process.pid}/task").glob("*/children")
        running = [int(pid) for each in children for pid in each.read_text().split()]
        assert running
        terminal.process.terminate()
        assert terminal.wait_for_end() == 143
        for pid in running:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
