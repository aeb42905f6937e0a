"""mixchat on Windows and macOS, as far as Linux can show it, and the one place that knows them."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import REPO, FakeHub
from tiny_tokenizer import write_tokenizer

import mixchat
from mixchat.base import system
from mixchat.base.files import open_regular
from mixchat.weights import models

PACKAGE = Path(mixchat.__file__).parent
DOUBLE = Path(__file__).with_name("other_system.py")
HANGS = 300  # seconds after which a test fails
SYSTEMS = ["win32", "darwin"]
ANSWER = ["run", "-m", "mine", "--temp", "0", "-n", "8", "--device", "cpu"]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the doubles are made of Linux")


class TestOnlyOneModuleKnowsTheSystem:
    FOREIGN = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "msvcrt", "winreg")
    ASKED = ("sys.platform", "os.name", "platform.system")

    def test_no_other_module_asks_for_it(self):
        for path in {*PACKAGE.rglob("*.py")} - {PACKAGE / "base" / "system.py"}:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    assert not {name.name for name in node.names} & {*self.FOREIGN}, path
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in self.ASKED, path

    def test_a_file_is_read_and_written_without_the_functions_of_posix(self, tmp_path, monkeypatch):
        for name in ("preadv", "pwrite"):
            monkeypatch.delattr(os, name, raising=False)
        path, data = tmp_path / "file", os.urandom(100_000)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        with open(descriptor, "wb", buffering=0) as file:
            assert system.write_at(descriptor, memoryview(b"middle"), 50) == 6
            file.write(data)  # the position is still at the beginning
            found = [bytearray(1000) for _ in range(100)]

            def read(number: int) -> None:
                system.read_at(descriptor, memoryview(found[number]), 1000 * number)

            threads = [threading.Thread(target=read, args=(number,)) for number in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert system.read_at(descriptor, memoryview(bytearray(9)), len(data)) == 0
        assert b"".join(found) == data == path.read_bytes()

    def test_a_process_is_limited_by_a_job_of_windows(self, monkeypatch):
        """The numbers lie where 64-bit Windows looks for them."""
        kernel = Kernel32()
        monkeypatch.setattr(system, "WINDOWS", True)
        monkeypatch.setattr(system, "_kernel32", lambda: kernel)
        system.limit_process(10**9)
        assert (kernel.kind, kernel.limited, kernel.assigned) == (9, 77, (77, 2**64 - 1))
        limits = Limits.from_buffer_copy(kernel.limits)
        assert limits.LimitFlags == 0x100 | 0x8  # JOB_OBJECT_LIMIT_PROCESS_MEMORY, _ACTIVE_PROCESS
        assert (limits.ActiveProcessLimit, limits.ProcessMemoryLimit) == (1, 10**9)


class Limits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION of 64-bit Windows."""

    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_uint64),
        ("MaximumWorkingSetSize", ctypes.c_uint64),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_uint64),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_uint64),
        ("JobMemoryLimit", ctypes.c_uint64),
        ("PeakProcessMemoryUsed", ctypes.c_uint64),
        ("PeakJobMemoryUsed", ctypes.c_uint64),
    )


class Kernel32:
    """The functions for jobs, which write down their arguments."""

    class CreateJobObjectW:
        def __new__(cls, *given: object) -> int:  # type: ignore[misc]
            return 77

    def SetInformationJobObject(self, job: Any, kind: int, limits: Any, size: int) -> None:
        self.limited, self.kind, self.limits = job.value, kind, bytes(limits._obj)
        assert size == len(self.limits) == ctypes.sizeof(Limits)

    def AssignProcessToJobObject(self, job: Any, process: Any) -> None:
        self.assigned = (job.value, process.value)


@pytest.mark.parametrize(
    "name", [r"C:\x\y.gguf", "C:/x/y.gguf", r"C:\x:Q4_K_M", r"\\host\share\y.gguf", "C:y.gguf"]
)
def test_a_path_with_a_drive_letter_is_no_repo_and_no_kind(name):
    assert not models._is_repo_id(name)


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


def run(name: str, environment: dict[str, str], *commands: list[str]) -> Any:
    words = [word for command in commands for word in ("and", *command)][1:]
    done = subprocess.run(
        [sys.executable, str(DOUBLE), name, *words],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return SimpleNamespace(out=done.stdout.decode(), said=done.stderr.decode())


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
class TestOtherSystem:
    def test_every_module_can_be_imported(self, name):
        code = (
            "import importlib, sys\n"
            "import other_system\n"
            "other_system.become(sys.argv[1])\n"
            "for name in sys.argv[2:]:\n importlib.import_module(name)\n"
        )
        files = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
        names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in files]
        path = os.pathsep.join((str(DOUBLE.parent), str(PACKAGE.parent)))
        subprocess.run(
            [sys.executable, "-c", code, name, *names],
            env=os.environ | {"PYTHONPATH": path},
            timeout=HANGS,
            check=True,
        )

    def test_a_model_is_downloaded_and_answers_as_on_linux(
        self, name, environment, tmp_path, checkpoint
    ):
        if name == "win32":  # which has no kernels
            environment["ATEN_CPU_CAPABILITY"] = "default"
        cache, answers = tmp_path / "cache", tmp_path / "answers"
        lines = tmp_path / "lines"
        lines.write_text('{"prompt": "Hi there"}\n{"prompt": "Hello"}\n')
        ask = [*ANSWER, "--json", "Hi there"]
        done = run(
            name,
            environment,
            ["download", REPO, "--name", "mine"],
            ["verify", "mine"],
            ask,
            [*ask, "--prompt-cache", str(cache)],
            [*ask, "--prompt-cache", str(cache)],
            [*ask, "--schema", '{"enum": ["tea", "milk"]}'],
            [*ANSWER, "--jsonl", str(lines), "--resume-from", str(answers)],
            [*ANSWER, "--jsonl", str(lines), "--resume-from", str(answers)],
            ["download", REPO, "--name", "kept", "--keep-source"],
            ["download", str(checkpoint), "--name", "other", "--expert-bits", "3"],
            ["convert", "mine", "--layout", "bitsandbytes"],
            ask,
            ["show", "mine"],
            ["stats", "mine"],
            ["rm", "other", "--yes"],
            ["gc"],
        )
        here = subprocess.run(
            [sys.executable, "-m", "mixchat", *ask],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=HANGS,
            check=True,
        )
        found = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
        first, _, cached, formed, again = found
        assert first["ids"]
        assert first["ids"] == cached["ids"] == again["ids"] == json.loads(here.stdout)["ids"]
        assert cached["usage"]["cached_tokens"] > 0
        assert json.loads(formed["answer"]) in ("tea", "milk")
        assert [json.loads(line)["line"] for line in answers.read_text().splitlines()] == [1, 2]
        assert sorted(path.name for path in (tmp_path / "home" / "models").iterdir()) == [
            "kept",
            "mine",
        ]

    def test_a_chat_is_saved_and_resumed(self, name, environment):
        ask = [*ANSWER, "--json", "--save", "--keep-cache"]
        done = run(
            name,
            environment,
            ["download", REPO, "--name", "mine"],
            [*ask, "Hi there"],
            [*ask, "--resume=last", "Again"],
            ["chats"],
        )
        lines = done.out.splitlines()
        first, second = (json.loads(line) for line in lines if line.startswith("{"))
        assert first["usage"]["cached_tokens"] == 0
        assert second["usage"]["cached_tokens"] > 0
        assert "Hi there" in done.out[done.out.rindex("}") :]

    def test_a_request_is_served(self, name, environment):
        run(name, environment, ["download", REPO, "--name", "mine"])
        serve = ["serve", "-m", "mine", "--port", "0", "--device", "cpu"]
        with subprocess.Popen(
            [sys.executable, str(DOUBLE), name, *serve],
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
                with urllib.request.urlopen(request, timeout=HANGS) as response:
                    answer = json.load(response)
                assert answer["usage"]["completion_tokens"] > 0
                server.terminate()
                assert server.wait(HANGS) == 143
            finally:
                server.kill()
