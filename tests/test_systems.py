"""mixchat on macOS, as far as Linux can show it, and the one place that knows the system."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import REPO, FakeHub
from patience import PATIENCE_S
from tiny_tokenizer import write_tokenizer

import mixchat

PACKAGE = Path(mixchat.__file__).parent
DOUBLE = Path(__file__).parent / "tools" / "other_system.py"
ANSWER = ["run", "-m", "mine", "--temp", "0", "-n", "8", "--device", "cpu"]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the doubles are made of Linux")


class TestOnlyOneModuleKnowsTheSystem:
    ASKED = ("sys.platform", "os.name", "platform.system")

    def test_no_other_module_asks_for_it(self):
        asking = {PACKAGE / "base" / "system.py", PACKAGE / "__main__.py"}  # the latter for Windows
        for path in {*PACKAGE.rglob("*.py")} - asking:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in self.ASKED, path


def test_windows_is_told_of_wsl_in_one_line():
    code = "import sys; import mixchat.__main__ as program; sys.platform = 'win32'; program.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "WSL 2" in done.stderr


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return write_tokenizer(
        make_checkpoint(vocab_size=262, intermediate_size=128, max_position_embeddings=512)
    )


@pytest.fixture
def environment(tmp_path: Path, checkpoint: Path) -> Iterator[dict[str, str]]:
    """The variables of a process, with a data directory of its own and a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXCHAT_")}
    kept.pop("HF_HUB_OFFLINE", None)
    with FakeHub({path.name: path.read_bytes() for path in checkpoint.iterdir()}) as hub:
        yield kept | {
            "MIXCHAT_HOME": str(tmp_path / "home"),
            "XDG_CONFIG_HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "*",
        }


def run(environment: dict[str, str], *commands: list[str]) -> Any:
    words = [word for command in commands for word in ("and", *command)][1:]
    done = subprocess.run(
        [sys.executable, str(DOUBLE), *words],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return SimpleNamespace(out=done.stdout.decode(), said=done.stderr.decode())


@on_linux
@pytest.mark.slow
class TestMacos:
    def test_every_module_can_be_imported(self):
        code = (
            "import importlib, sys\n"
            "import other_system\n"
            "other_system.become_macos()\n"
            "for name in sys.argv[1:]:\n importlib.import_module(name)\n"
        )
        files = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
        names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in files]
        path = os.pathsep.join((str(DOUBLE.parent), str(PACKAGE.parent)))
        subprocess.run(
            [sys.executable, "-c", code, *names],
            env=os.environ | {"PYTHONPATH": path},
            timeout=PATIENCE_S,
            check=True,
        )

    def test_a_model_is_downloaded_and_answers_as_on_linux(self, environment, tmp_path, checkpoint):
        cache, answers = tmp_path / "cache", tmp_path / "answers"
        lines = tmp_path / "lines"
        lines.write_text('{"prompt": "Hi there"}\n{"prompt": "Hello"}\n')
        ask = [*ANSWER, "--json", "Hi there"]
        chat = [*ANSWER, "--json", "--save", "--keep-cache"]
        done = run(
            environment,
            ["download", REPO, "--name", "mine", "--dense-bits", "8"],
            ["verify", "mine"],
            ask,
            [*ask, "--prompt-cache", str(cache)],
            [*ask, "--prompt-cache", str(cache)],
            [*ask, "--schema", '{"enum": ["tea", "milk"]}'],
            [*ANSWER, "--jsonl", str(lines), "--resume-from", str(answers)],
            [*ANSWER, "--jsonl", str(lines), "--resume-from", str(answers)],
            ["download", REPO, "--name", "kept", "--keep-source"],
            ["download", str(checkpoint), "--name", "other", "--expert-bits", "3"],
            ask,
            ["show", "mine"],
            ["stats", "mine"],
            ["rm", "other", "--yes"],
            ["gc"],
            [*chat, "Hi there"],
            [*chat, "--resume=last", "Again"],
            ["chats"],
        )
        here = subprocess.run(
            [sys.executable, "-m", "mixchat", *ask],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=PATIENCE_S,
            check=True,
        )
        found = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
        first, _, cached, formed, again, saved, resumed = found
        assert first["ids"]
        assert first["ids"] == cached["ids"] == again["ids"] == json.loads(here.stdout)["ids"]
        assert cached["usage"]["cached_tokens"] > 0
        assert json.loads(formed["answer"]) in ("tea", "milk")
        assert [json.loads(line)["line"] for line in answers.read_text().splitlines()] == [1, 2]
        assert sorted(path.name for path in (tmp_path / "home" / "models").iterdir()) == [
            "kept",
            "mine",
        ]
        assert saved["usage"]["cached_tokens"] == 0
        assert resumed["usage"]["cached_tokens"] > 0
        assert "Hi there" in done.out[done.out.rindex("}") :]

    def test_a_request_is_served(self, environment):
        download = ["download", REPO, "--name", "mine"]
        serve = ["serve", "-m", "mine", "--port", "0", "--device", "cpu"]
        with subprocess.Popen(
            [sys.executable, str(DOUBLE), *download, "and", *serve],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as server:
            try:
                assert server.stderr is not None
                found, said = None, ""
                while found is None:
                    line = server.stderr.readline()
                    said += line
                    assert line, said
                    found = re.match(r"(http://\S+): serving mine", line)
                body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
                request = urllib.request.Request(
                    f"{found[1]}/chat/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                    answer = json.load(response)
                assert answer["usage"]["completion_tokens"] > 0
                server.terminate()
                assert server.wait(PATIENCE_S) == 143
            finally:
                server.kill()
