"""llama.cpp with one model, in a process of its own that measures on request."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from mixchat.base.errors import MissingDependencyError, ResourceError

_CHILD = Path(__file__).with_name("peer_child.py")
_WARM = 2  # tokens whose time is not taken


def write_model(python: str, path: Path, layers: int, format: str, shape: str = "instruct") -> None:
    """Write a GGUF file with as many layers of a known model, in a format of llama.cpp."""
    command = [python, str(_CHILD), "make", str(path), str(layers), format, "--shape", shape]
    _checked(subprocess.run(command, check=False))


def require(python: str) -> None:
    """Raise `MissingDependencyError` where this Python has no llama.cpp."""
    program = "import llama_cpp, gguf"
    if subprocess.run([python, "-c", program], capture_output=True, check=False).returncode:
        raise MissingDependencyError(
            f"llama.cpp needs llama-cpp-python and gguf, which {python} does not have",
            hint="CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf, "
            "or name a Python that has them with --python.",
        )


class Peer:
    """llama.cpp with one model. Use it as a context manager.

    gpu_layers: those that a GPU computes, -1 for all. kv_bits: 16, or 8 (Q8_0).
    """

    def __init__(
        self, python: str, model: Path, context: int, gpu_layers: int = 0, kv_bits: int = 16
    ) -> None:
        command = [python, str(_CHILD), "serve", str(model)]
        command += map(str, (context, gpu_layers, kv_bits))
        # A file, because llama.cpp may print more than a pipe holds.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._output, text=True
        )
        try:
            self._answer()  # it has loaded
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._output.close()

    def decode(self, context: int, tokens: int) -> float:
        """Return tokens a second behind `context` tokens."""
        seconds = self._ask(f"{context}: {'1 ' * (tokens + _WARM)}")[_WARM:]
        return tokens / sum(seconds)

    def decode_together(self, sequences: int, tokens: int) -> float:
        """Return tokens a second of so many sequences, each with so many tokens."""
        seconds = self._ask(f"{sequences}x{tokens + _WARM}")[_WARM:]
        return sequences * tokens / sum(seconds)

    def prefill(self, tokens: int) -> float:
        """Return tokens a second of a prompt of this length."""
        return tokens / self._ask(f"0: {tokens}")[0]

    def _ask(self, line: str) -> list[float]:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return [float(number) for number in self._answer().split()]

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            self._output.seek(0)
            last = self._output.read().decode(errors="replace").split("\n")[-3:]
            raise ResourceError(f"llama.cpp ended early: {' '.join(last).strip()}")
        return line


def _checked(done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode:
        raise ResourceError(f"llama.cpp's model could not be written (exit {done.returncode})")
