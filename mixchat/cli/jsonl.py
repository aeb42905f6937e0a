"""`mixchat run --jsonl`: the file of prompts, the file of answers, and where to continue."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mixchat.chat.printing import show
from mixchat.cli.flags.arguments import STDIN
from mixchat.cli.opening import open_service
from mixchat.cli.output.print_answer import OutputOptions
from mixchat.errors import PromptError, UsageError
from mixchat.files import open_regular, write_all, write_error
from mixchat.lock import lock_open_file
from mixchat.options import LoadOptions
from mixchat.progress import Note

if TYPE_CHECKING:
    from mixchat.serving.requests.lines import Line

_START = b'{"line": '  # of each line of the output


@dataclass(frozen=True)
class LineRequest:
    """The file to answer, `-` for standard input, and what applies where a line says nothing.

    resume_from: the file that gets the answers, and may have some; None for standard output.
    """

    source: str
    resume_from: Path | None
    sampling: Mapping[str, float | None]
    system: str | None
    max_tokens: int | None
    stop: Sequence[str]


def answer_file(model: str, load: LoadOptions, request: LineRequest, output: OutputOptions) -> None:
    """Answer a file of prompts, `load.parallel` at once.

    Raises `UsageError` where a file cannot be used, before the model is loaded; `PromptError` at
    the end where some lines could not be answered.
    """
    with open_lines(request.source) as lines, open_answers(request.resume_from) as answers:
        from mixchat.serving.requests.lines import AHEAD, LineDefaults, answer_lines
        from mixchat.serving.requests.served_forms import forms_of

        queue = AHEAD * load.parallel
        service, advice = open_service(model, load, queue, output, request.sampling)
        if request.max_tokens is not None:
            advice = replace(advice, max_tokens=request.max_tokens)
        seed = request.sampling["seed"]
        fields = {"stop": list(request.stop)} | ({} if seed is None else {"seed": seed})
        defaults = LineDefaults(advice, fields, request.system)
        forms = forms_of(service)
        with closing(service):
            write_answers(
                lines,
                answers,
                lambda lines: answer_lines(service, lines, defaults, forms, load.parallel),
                output.note,
            )


class AnswerFile:
    """The file of `--resume-from`: answers from an earlier run, to which the next are added.

    `last` is the number of the input's line that was answered last; 0 for none. A line that was
    cut off is removed. Raises `UsageError` where the file holds anything else.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor, self.last = path, descriptor, 0
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            whole = self._whole(file)
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)

    def _whole(self, file: BinaryIO) -> int:
        """Return the bytes of the whole lines, and note the last one."""
        size = 0
        for line in iter(file.readline, b""):
            if not line.endswith(b"\n") and line[: len(_START)] == _START[: len(line)]:
                break
            self.last, size = self._number(line), size + len(line)
        return size

    def _number(self, line: bytes) -> int:
        try:
            number = json.loads(line)["line"]
            if type(number) is int and number > self.last:
                return number
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UsageError(
            f"--resume-from {self._path}: it has a line that --jsonl has not written",
            hint="Name the file that --jsonl has written, or one that does not exist yet.",
        )

    def write(self, answer: dict[str, Any]) -> None:
        """Add a line. Raises `ResourceError` where the disk is full."""
        try:
            write_all(self._descriptor, json.dumps(answer).encode() + b"\n")
        except OSError as error:
            raise write_error(error, self._path, "the answers cannot be written") from None


class StandardOutput:
    """Answers on standard output."""

    last = 0

    def write(self, answer: dict[str, Any]) -> None:
        """Print a line."""
        show(json.dumps(answer))


@contextmanager
def open_answers(path: Path | None) -> Iterator[AnswerFile | StandardOutput]:
    """Open the file of `--resume-from`, or standard output.

    Raises `UsageError` where the file cannot be written, or another process is writing it.
    """
    if path is None:
        yield StandardOutput()
        return
    with ExitStack() as opened:
        try:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
            opened.callback(os.close, descriptor)
            is_ours = lock_open_file(descriptor)
        except OSError as error:
            raise UsageError(f"--resume-from {path}: {error.strerror}") from None
        if not is_ours:
            raise UsageError(
                f"--resume-from {path}: another mixchat is writing its answers there",
                hint="Wait until it has finished, or stop it.",
            )
        yield AnswerFile(path, descriptor)


@contextmanager
def open_lines(source: str) -> Iterator[Iterable[bytes]]:
    """Open the file of prompts; `-` is standard input. Raises `UsageError` where it cannot."""
    if source == STDIN:
        yield iter(()) if sys.stdin is None else sys.stdin.buffer
        return
    try:
        descriptor = open_regular(Path(source))
    except OSError as error:
        raise UsageError(f"--jsonl {source}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        yield file


def write_answers(
    lines: Iterable[bytes],
    answers: AnswerFile | StandardOutput,
    answer: Callable[[Iterable[tuple[int, bytes]]], Iterator[Line]],
    note: Note,
) -> None:
    """Answer the lines behind those that are answered already, and write each as it is ready.

    Raises `PromptError` at the end where some could not be answered, and at once what is no fault
    of a line: that line is not written, and is answered where the run is resumed.
    """
    from mixchat.serving.requests.failures import is_fault_of_request

    numbered = (item for item in enumerate(lines, start=1) if item[0] > answers.last)
    count = failed = tokens = 0
    start = time.perf_counter()
    for line in answer(numbered):
        if isinstance(line.done, Exception) and not is_fault_of_request(line.done):
            raise line.done
        answers.write(line.as_dict())
        count += 1
        failed += isinstance(line.done, Exception)
        tokens += 0 if isinstance(line.done, Exception | None) else line.done.generated_tokens
    seconds = time.perf_counter() - start
    rate = f", {tokens / seconds:.1f} tok/s" if tokens else ""
    note(f"{count} line{'' if count == 1 else 's'} in {seconds:.1f} s{rate}")
    if failed:
        raise PromptError(
            f"{failed} of {count} lines could not be answered", hint='Each has an "error" instead.'
        )
