"""`mixchat serve` as a process: its first line, its refusals, and its end by signals."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from patience import PATIENCE_S
from raw_http import exchange, read_response, request

DOCKERFILE = Path(__file__).parents[3] / ".github/Dockerfile"
CHAT = "/v1/chat/completions"


class Process:
    """A server in a process of its own, on a free port."""

    def __init__(self, program):
        self.program = program
        self.first_line = line = self.next_line()
        while line.startswith("note: "):
            line = self.next_line()
        found = re.match(r"http://\S+:(\d+)/v1: serving ", line)
        assert found, self.first_line + program.stderr.read()
        self.port = int(found[1])
        self.context_line = self.next_line()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def ask(self, text, **options):
        """A connection on which a question was sent."""
        connection = self.connect()
        body = {"messages": [{"role": "user", "content": text}]}
        connection.sendall(request(CHAT, body | options))
        return connection

    def wait_until_running(self, count):
        while f"requests_running {count}" not in exchange(self, request("/metrics")).body.decode():
            time.sleep(0.01)

    def wait_until_closing(self):
        """Wait until it takes no more connections."""
        with suppress(ConnectionError):
            while exchange(self, request("/health")).status == 200:
                time.sleep(0.01)

    def next_line(self):
        """The next line that it prints, which is waited for."""
        return self.program.stderr.readline()

    def end(self):
        """The exit code, and what was printed after the lines that were read."""
        return self.program.wait(PATIENCE_S)


ENDING = "note: {} may end, for 7 s\n"
ENDING_AT_ONCE = "note: 1 answer may end, for 7 s; Ctrl-C ends them at once\n"


@pytest.fixture
def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXCHAT_")}
    return kept | {"MIXCHAT_HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path)}


@pytest.fixture
def program(fake_serve, environment):
    """Starts `mixchat serve` with a scripted model."""
    programs = []

    def program(*arguments, variables=None):
        programs.append(fake_serve(arguments, environment | (variables or {})))
        return programs[-1]

    yield program
    for started in programs:
        started.close()


@pytest.fixture
def start(program):
    """Starts a server, and waits until it serves."""

    def start(*arguments, variables=None):
        return Process(program("--port", "0", *arguments, variables=variables))

    return start


@pytest.fixture
def refused(program):
    """The exit code and the lines of a server that does not start."""

    def run(*arguments):
        return program(*arguments).wait(PATIENCE_S)

    return run


def content(response):
    return response.json["choices"][0]["message"]["content"]


def test_its_first_line_names_the_model_and_the_urls_for_programs_and_for_a_browser(start):
    process = start("-m", "demo")
    url = f"http://127.0.0.1:{process.port}"
    assert process.first_line == (
        f"{url}/v1: serving demo; a browser opens {url}; Ctrl-C ends it\n"
    )
    assert exchange(process, request("/v1/models")).json["data"][0]["id"] == "demo"
    process = start("-m", "demo", "--no-page")
    assert process.first_line.endswith("/v1: serving demo; Ctrl-C ends it\n")


def test_aliases_are_names_of_the_model(start):
    """Tools that have names of models built in could not be used."""
    given = ["--alias", "gpt-4o=demo", "--alias", "b=other"]
    process = start("-m", "demo", *given, variables={"MIXCHAT_ALIAS": "unused=demo"})
    assert process.first_line == (
        "note: --alias b: this server has no model 'other'; --swap serves other installed models, "
        "too\n"
    )
    listed = exchange(process, request("/v1/models")).json["data"]
    assert [model["id"] for model in listed] == ["demo", "gpt-4o"]
    body = {"messages": [{"role": "user", "content": "say:well"}]}
    for name, status in {"gpt-4o": 200, "gpt-4o:latest": 200, "b": 404, "unused": 404}.items():
        assert exchange(process, request(CHAT, {"model": name, **body})).status == status


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_without_a_word(start, number, code):
    process = start()
    with process.connect():  # an idle connection keeps nobody
        process.program.send_signal(number)
        assert process.end() == (code, "")


@pytest.mark.skipif(sys.platform != "linux", reason="threads have ids in /proc")
def test_a_signal_that_the_system_gives_to_another_thread_ends_it(start):
    # The main thread, which alone handles signals, waited without an end and saw none.
    process = start()
    pid = process.program.pid
    thread = max(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    assert thread != pid
    ctypes.CDLL(None).tgkill(pid, thread, signal.SIGTERM)
    assert process.end() == (143, "")


def test_running_answers_come_to_their_end_and_new_connections_are_refused(start, tmp_path):
    """It answered 503, which a load balancer passes on to the client."""
    process = start(variables={"GATE": str(tmp_path / "gate")})
    text = "say:a{gate}b"
    with process.ask(text) as whole, process.ask(text, stream=True) as streamed:
        process.wait_until_running(2)
        process.program.send_signal(signal.SIGTERM)
        # Only then: a question that comes before it would be counted.
        assert process.next_line() == ENDING.format("2 answers")
        process.wait_until_closing()
        with pytest.raises(ConnectionRefusedError):
            process.connect()
        (tmp_path / "gate").touch()
        assert content(read_response(whole)) == "ab"
        assert b"data: [DONE]" in read_response(streamed).body
    assert process.end() == (143, "")


def test_a_request_that_came_before_the_signal_is_answered(start):
    """It was refused if its body came after the signal."""
    process = start()
    body = json.dumps({"messages": [{"role": "user", "content": "say:well"}]}).encode()
    whole = request(CHAT, body)
    with process.connect() as late, process.connect() as idle:
        late.sendall(whole[:-1])
        assert exchange(process, request("/health")).status == 200
        process.program.send_signal(signal.SIGTERM)
        process.wait_until_closing()
        assert idle.recv(1) == b""
        late.sendall(whole[-1:])
        assert content(read_response(late)) == "well"
    assert process.end() == (143, "")


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_without_an_end_is_cut_off(start, whole):
    process = start("--drain", "1s")
    with process.ask("say:a{hang}", stream=not whole) as asked:
        process.wait_until_running(1)
        process.program.send_signal(signal.SIGTERM)
        response = read_response(asked)
        if whole:
            assert (response.status, response.error["code"]) == (503, "shutting_down")
        else:
            assert b'"content":"a"' in response.body
            assert b"the answer is cut off" in response.body
    assert process.end() == (143, "note: 1 answer may end, for 1 s\n")


def test_a_second_ctrl_c_ends_it_at_once(start):
    process = start()
    with process.ask("say:a{hang}") as asked:
        process.wait_until_running(1)
        process.program.send_signal(signal.SIGINT)
        assert process.next_line() == ENDING_AT_ONCE
        process.wait_until_closing()
        process.program.send_signal(signal.SIGINT)
        assert process.end() == (130, "")
        with pytest.raises(ConnectionError):
            read_response(asked)


def test_with_a_key_which_may_be_a_variable_it_may_be_reached_from_elsewhere(start):
    process = start("--host", "0.0.0.0", variables={"MIXCHAT_API_KEY": "secret"})
    assert process.first_line.startswith("http://0.0.0.0:")
    assert f"a browser opens http://localhost:{process.port};" in process.first_line
    assert exchange(process, request("/v1/models")).status == 401
    data = request("/v1/models", host="box.example", authorization="Bearer secret")
    assert exchange(process, data).status == 200


def test_the_command_of_the_dockerfile_serves_a_model_that_it_can_build(start):
    """It asked for `instruct`, which a new volume lacks."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    command, arguments = (
        json.loads(re.search(rf"^{name} (.*)$", text, re.MULTILINE)[1])
        for name in ("ENTRYPOINT", "CMD")
    )
    assert (command, arguments[0]) == (["mixchat"], "serve")
    variables = dict(re.findall(r"(MIXCHAT_\w+)=(\S+)", re.search(r"^ENV .*$", text, re.M)[0]))
    del variables["MIXCHAT_HOME"]
    process = start(*arguments[1:], variables=variables | {"MIXCHAT_API_KEY": "secret"})
    assert process.first_line.startswith(f"http://0.0.0.0:{process.port}/v1: serving demo;")


def test_it_listens_on_ipv6_too(start):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    process = start("--host", "::1")
    assert process.first_line.startswith(f"http://[::1]:{process.port}/v1: serving instruct;")
    with socket.create_connection(("::1", process.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request("/health", host=f"[::1]:{process.port}"))
        assert read_response(connection).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_a_key_it_may_not(refused, host):
    code, said = refused("--host", host)
    assert (code, said) == (
        2,
        f"error: --host {host}: whoever reaches this machine could use the server\n"
        "hint: Set a key in MIXCHAT_API_KEY, or leave --host out to serve this machine alone.\n",
    )


def test_a_port_in_use_is_told(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = refused("--port", str(port))
    assert code == 2
    assert said == (
        f"error: 127.0.0.1:{port}: the port is in use\n"
        "hint: Perhaps a server runs already. --port N takes another port.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port"),
        (["--parallel", "0"], "--parallel"),
        (["--queue", "-1"], "--queue"),
        (["--host", "no such host"], "cannot read"),
        (["--cors", "localhost:3000"], "is no origin"),
        (["--cors", "http://localhost:3000/page"], "is no origin"),
        (["--alias", "gpt-4o"], "is no NAME=MODEL"),
        (["--alias", "=demo"], "is no NAME=MODEL"),
        (["--alias", f"{'a' * 201}=demo"], "is no NAME=MODEL"),
        (["--alias", "a\x1b=demo"], "cannot be shown"),
        (["--alias", "a=demo", "--alias", "a:latest=b"], "given twice"),
        ([f"--alias=a{n}=demo" for n in range(101)], "100 names at most"),
        (["--drain", "soon"], "cannot read 'soon' as a time"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "a b\n"], "the API key has to be"),
        (["--api-key", "schlüssel"], "the API key has to be"),
    ],
)
def test_what_cannot_be_used_is_refused(refused, arguments, said):
    code, printed = refused(*arguments)
    assert code == 2
    assert said in printed
    assert "Traceback" not in printed


def test_a_field_of_another_server_is_named_once_in_the_log_or_refused_by_a_strict_server(start):
    body = {"messages": [{"role": "user", "content": "Hi"}], "think": True}
    server, strict = start(), start("--strict")
    assert [exchange(server, request(CHAT, body)).status for _ in range(3)] == [200] * 3
    assert exchange(strict, request(CHAT, body)).error["param"] == "think"
    for process in (server, strict):
        process.program.send_signal(signal.SIGTERM)
    assert server.end() == (143, "note: requests have the field think, which has no effect here\n")
    assert strict.end() == (143, "")
