"""Two servers behind the nginx of .github/nginx.conf: load, restarts, and a server that dies."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from patience import PATIENCE_S, wait_until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
OPENSSL = shutil.which("openssl")
CONF = Path(__file__).parents[3] / ".github/nginx.conf"
KEY = "secret"
CLIENTS = 8  # at once
MAIN = """\
daemon off;
pid {0}/pid;
error_log {0}/errors;
worker_processes 2;
{1}
events {{ }}
http {{
    access_log off;
    client_body_temp_path {0}/body;
    proxy_temp_path {0}/proxy;
    fastcgi_temp_path {0}/fastcgi;
    uwsgi_temp_path {0}/uwsgi;
    scgi_temp_path {0}/scgi;
    include {0}/mixchat.conf;
}}
"""

pytestmark = [pytest.mark.skipif(not NGINX or not OPENSSL, reason="needs nginx and openssl")]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A scripted server, which may be started again on its port."""

    def __init__(self, fake_serve, directory):
        self.port, self._directory, self._fake_serve = free_port(), directory, fake_serve
        self.start()

    def start(self):
        home, gate = str(self._directory), str(self._directory / "gate")
        variables = {"MIXCHAT_HOME": home, "MIXCHAT_API_KEY": KEY, "GATE": gate}
        arguments = ["--port", str(self.port), "--drain", "1m"]
        self._program = self._fake_serve(arguments, os.environ | variables)
        first_line = self._program.stderr.readline()
        if ": serving " not in first_line:
            self.kill()
            raise AssertionError(first_line)

    def restart(self):
        """Restart it as its owner would, with SIGTERM, and return when it serves again."""
        self._program.send_signal(signal.SIGTERM)
        code, _ = self._program.wait(PATIENCE_S)
        assert code == 143
        self._program.close()
        self.start()

    def wait_until_it_drains(self):
        with suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S).close()
                time.sleep(0.01)

    def kill(self):
        self._program.close()

    def metric(self, name):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        text = connection.getresponse().read().decode()
        connection.close()
        return int(re.search(rf"^mixchat_{name} (\d+)$", text, re.MULTILINE)[1])

    def wait_for(self, name, count=1):
        wait_until(lambda: self.metric(name) >= count)


@dataclass
class Team:
    """nginx with TLS on a port, and the servers that it asks."""

    port: int
    servers: list[Server]
    tls: ssl.SSLContext
    gate: Path

    def open(self, text, stream=False, padding=0, **headers):
        """Ask, and return the response."""
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=PATIENCE_S, context=self.tls
        )
        body = {"messages": [{"role": "user", "content": text}], "user": "x" * padding}
        headers |= {"Authorization": f"Bearer {KEY}", "Connection": "close"}
        data = json.dumps(body | {"stream": stream})
        connection.request("POST", "/v1/chat/completions", data, headers)
        return connection.getresponse()

    def ask(self, text, stream=False):
        """Return the answer. Raises `OSError` or `HTTPException` if it is not whole."""
        with self.open(text, stream) as response:
            data = response.read()
        if response.status != 200:
            raise OSError(f"{response.status}: {data!r}")
        if not stream:
            return json.loads(data)["choices"][0]["message"]["content"]
        *events, last = re.findall(r"^data: (.*)$", data.decode(), re.MULTILINE)
        assert last == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        return "".join(delta.get("content") or "" for delta in deltas)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", directory / "key.pem", "-out", directory / "cert.pem"]
    command = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *names, *files], check=True, capture_output=True, timeout=PATIENCE_S)
    return directory


def configured(directory, port, servers, certificate):
    """Return the main file, which includes the repository's with other addresses and files."""
    text = CONF.read_text(encoding="utf-8")
    for pattern, value, count in [
        (r"(?<=server )10\.0\.0\.2:11435", f"127.0.0.1:{servers[0].port}", 2),
        (r"(?<=server )10\.0\.0\.3:11435", f"127.0.0.1:{servers[1].port}", 2),
        (r"(?<=listen )443", f"127.0.0.1:{port}", 1),
        (r"(?<=ssl_certificate )[^;]+", str(certificate / "cert.pem"), 1),
        (r"(?<=ssl_certificate_key )[^;]+", str(certificate / "key.pem"), 1),
    ]:
        text, replaced = re.subn(pattern, value, text)
        assert replaced == count, pattern
    (directory / "mixchat.conf").write_text(text)
    user = (
        "user root;" if os.geteuid() == 0 else ""
    )  # else its processes could not read these files
    (directory / "nginx.conf").write_text(MAIN.format(directory, user))
    return directory / "nginx.conf"


@pytest.fixture
def team(tmp_path, certificate, fake_serve):
    with ExitStack() as at_end:
        servers = []
        for _ in range(2):
            servers.append(Server(fake_serve, tmp_path))
            at_end.callback(servers[-1].kill)
        port = free_port()
        nginx = subprocess.Popen(
            [NGINX, "-e", "stderr", "-c", configured(tmp_path, port, servers, certificate)]
        )
        at_end.callback(nginx.wait)
        at_end.callback(nginx.terminate)
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert nginx.poll() is None
            time.sleep(0.01)
        tls = ssl.create_default_context(cafile=certificate / "cert.pem")
        yield Team(port, servers, tls, tmp_path / "gate")


@pytest.mark.slow
def test_restarts_under_load_lose_no_answer(team):
    outcomes, over = Counter(), threading.Event()
    numbers = itertools.count()

    def ask_until_over():
        while not over.is_set():
            number = next(numbers)
            try:
                answer = team.ask(f"say:no{{wait}}.{{wait}}{number}", stream=number % 2 == 0)
                outcomes["right" if answer == f"no.{number}" else f"wrong: {answer}"] += 1
            except (OSError, http.client.HTTPException) as error:
                outcomes[repr(error)] += 1

    clients = [threading.Thread(target=ask_until_over) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        for server in team.servers * 2:
            server.wait_for("requests_finished_total", 20)
            server.restart()
        for server in team.servers:  # each has come back
            server.wait_for("requests_finished_total", 20)
    finally:
        over.set()
        for client in clients:
            client.join()
    assert list(outcomes) == ["right"], outcomes
    assert outcomes["right"] > 120


def test_answers_come_to_their_end_while_their_servers_restart(team):
    """One is sent whole, and one is a stream."""
    streamed = team.open("say:a{gate}b", stream=True)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(team.ask("say:c{gate}d")))
    asking.start()
    first, second = team.servers
    first.wait_for("requests_running")
    second.wait_for("requests_running")
    restarting = [threading.Thread(target=server.restart) for server in team.servers]
    for thread in restarting:
        thread.start()
    for server in team.servers:
        server.wait_until_it_drains()
    team.gate.touch()
    rest = streamed.read().decode()
    for thread in (asking, *restarting):
        thread.join()
    assert answers == ["cd"]
    assert '"content":"b"' in rest
    assert rest.rstrip().endswith("data: [DONE]")


def test_another_server_gives_the_whole_answer_of_one_that_dies(team):
    answers = []
    asking = threading.Thread(target=lambda: answers.append(team.ask("say:a{gate}b")))
    asking.start()
    while not (busy := [s for s in team.servers if s.metric("requests_running")]):
        time.sleep(0.01)
    busy[0].kill()
    team.gate.touch()
    asking.join()
    assert answers == ["ab"]


def test_a_stream_comes_piece_by_piece(team):
    with team.open("say:a{gate}b", stream=True) as response:
        before = ""
        while '"content":"a"' not in before:
            before += response.readline().decode()
        team.gate.touch()
        assert b'"content":"b"' in response.read()


def test_the_pages_own_requests_are_taken_and_large_bodies_are_not(team):
    origin = f"https://localhost:{team.port}"
    assert team.open("say:a", Origin=origin).status == 200
    assert team.open("say:a", Origin="https://elsewhere").status == 403
    assert team.open("say:a", padding=1_400_000).status == 200
    refused = team.open("say:a", padding=2_050_000)
    assert (refused.status, refused.headers["x-request-id"]) == (413, None)  # by nginx itself
