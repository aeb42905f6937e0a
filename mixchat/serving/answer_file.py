"""Answers a file of prompts for `mixchat run --jsonl`, and resumes the file of answers."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mixchat.base.errors import PromptError, UsageError
from mixchat.base.files import MAX_SIZE, open_regular, write_all, write_error
from mixchat.base.lock import lock_open_file
from mixchat.base.options import ChatOptions, with_numbers
from mixchat.base.progress import Note, Reporter, waiting_for
from mixchat.base.quantities import format_count
from mixchat.chat.printing import show
from mixchat.face.events import End, Failed
from mixchat.face.local_models import LocalModels
from mixchat.serving.client.server_models import ServerModels

if TYPE_CHECKING:
    from mixchat.serving.requests.lines import Begin, Line

_STDIN = "-"
_START = b'{"line": '  # of each line of the output


def answer_file(
    models: LocalModels | ServerModels,
    name: str,
    options: ChatOptions,
    reporter: Reporter,
    *,
    prompts: str,
    resume_from: Path | None,
    keep_failed: bool,
    parallel: int,
) -> None:
    """Answer the file `prompts`, `-` for standard input, with `parallel` answers at once.

    The answers are added to the file `resume_from`, or go to standard output. With `keep_failed`
    failed lines are not tried again. Raises `UsageError` if a file cannot be used, before the model
    is loaded, and `PromptError` at the end if some lines could not be answered.
    """
    with (
        open_lines(prompts, reporter.note) as file,
        open_answers(resume_from, keep_failed=keep_failed) as answers,
        ExitStack() as opened,
    ):
        from mixchat.serving.requests.lines import answer_lines, longest_line, numbered_lines

        longest = longest_line(models.context_of(name))
        lines: Iterator[tuple[int, bytes]] = (
            (number, text)
            for number, text in numbered_lines(file, longest)
            if answers.want(number) and text.strip()
        )
        # Only then, because the first line of a slow pipe would hold up the model.
        if answers.count:
            first = list(islice(lines, 1))
            if not first:  # nothing is left for which to load a model
                write_answers((), answers, reporter.note)
                return
            lines = chain(first, lines)
        begin = _opened(models, name, options, parallel, opened)
        write_answers(answer_lines(lines, begin, parallel), answers, reporter.note)


def _opened(
    models: LocalModels | ServerModels,
    name: str,
    options: ChatOptions,
    parallel: int,
    opened: ExitStack,
) -> Begin:
    """Load a model until `opened` is closed, and return what begins the answers of lines.

    A line's own fields go before `options`.
    """
    from mixchat.serving.requests.lines import AHEAD, LineDefaults, answered_by, answered_here

    stop = {"stop": list(options.stop)} if options.stop else {}
    if isinstance(models, ServerModels):
        numbers = {**options.sampling, "max_tokens": options.max_tokens or None}
        fields = {name: value for name, value in numbers.items() if value is not None} | stop
        defaults = LineDefaults(fields, options.system)
        return answered_by(models.open(name), defaults, parallel)
    model = models.open(name, waiting=AHEAD * parallel)
    opened.callback(model.close)
    # The model answers this file alone, and bodies leave to its advice what they do not have.
    model.sampling = with_numbers(model.sampling, options.sampling)
    if options.max_tokens is not None:
        model.advised_tokens = options.max_tokens
    return answered_here(model, LineDefaults(stop, options.system))


class Answers:
    """Standard output, or the file of `--resume-from`, to which answers are added.

    A line that failed is answered again, unless `keep_failed` is set. A line that was cut off is
    removed. Raises `UsageError` if the file holds anything else.

    last: the largest number of a line that has an answer. already: the lines that the file had
    answered when it was opened. failed: the lines whose last answer is an
    error.
    """

    def __init__(
        self, path: Path | None = None, descriptor: int = -1, *, keep_failed: bool = False
    ) -> None:
        self.last = self.count = 0
        self.failed: set[int] = set()
        self._path = path
        self._descriptor = descriptor
        if path is not None:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                size = self._read(file, path)
            os.ftruncate(descriptor, size)
            os.lseek(descriptor, size, os.SEEK_SET)
        self.already = self.count - len(self.failed)
        self._done = self.last
        self._again = frozenset(() if keep_failed else self.failed)

    def want(self, number: int) -> bool:
        """Return whether a line has to be answered."""
        return number > self._done or number in self._again

    def write(self, answer: dict[str, Any]) -> None:
        """Add a line. Raises `ResourceError` if the disk is full."""
        if self._path is None:
            show(json.dumps(answer))
        else:
            try:
                write_all(self._descriptor, json.dumps(answer).encode() + b"\n")
            except OSError as error:
                raise write_error(error, self._path, "the answers cannot be written") from None
        self._note(answer)

    def _note(self, answer: dict[str, Any]) -> None:
        """Note the answer of a line. Its last answer counts."""
        number = answer["line"]
        self.count += number > self.last
        self.last = max(self.last, number)
        if "error" in answer:
            self.failed.add(number)
        else:
            self.failed.discard(number)

    def _read(self, file: BinaryIO, path: Path) -> int:
        """Note the answers. Return the bytes of the whole lines."""
        size = 0
        while line := file.readline(MAX_SIZE):
            cut_off = not line.endswith(b"\n") and len(line) < MAX_SIZE
            if cut_off and line[: len(_START)] == _START[: len(line)]:
                break
            try:
                answer = json.loads(line)
                number = answer["line"]
                is_ours = type(number) is int and (number > self.last or number in self.failed)
            except (ValueError, TypeError, KeyError, RecursionError):
                is_ours = False
            if not is_ours:
                raise UsageError(
                    f"--resume-from {path}: it has a line that --jsonl has not written",
                    hint="Name the file that --jsonl has written, or one that does not exist yet.",
                )
            self._note(answer)
            size += len(line)
        return size


@contextmanager
def open_answers(path: Path | None, *, keep_failed: bool = False) -> Iterator[Answers]:
    """Open the file of `--resume-from`, or standard output.

    Raises `UsageError` if it cannot be written, or another process is writing it.
    """
    if path is None:
        yield Answers()
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
        yield Answers(path, descriptor, keep_failed=keep_failed)


@contextmanager
def open_lines(path: str, note: Note) -> Iterator[BinaryIO]:
    """Open the file of prompts, or standard input for `-`. Raises `UsageError` if that fails."""
    if path == _STDIN:
        yield io.BytesIO() if sys.stdin is None else sys.stdin.buffer
        return
    try:
        with waiting_for(path, note):
            file = open(path, "rb")  # noqa: SIM115 - only an error of opening is reported here
    except OSError as error:
        raise UsageError(f"--jsonl {path}: {error.strerror}") from None
    with file:
        yield file


def write_answers(lines: Iterable[Line], answers: Answers, note: Note) -> None:
    """Write each answered line as it is ready.

    Raises `PromptError` at the end if some line could not be answered. Raises at once an error that
    is not a line's fault.
    """
    from mixchat.serving.requests.errors import as_request_error

    count = tokens = 0
    start = time.perf_counter()
    for line in lines:
        if isinstance(line.end, Failed) and as_request_error(line.end.error).status >= 500:
            raise line.end.error
        answers.write(line.as_dict())
        count += 1
        tokens += line.end.stats.generated_tokens if isinstance(line.end, End) else 0
    seconds = time.perf_counter() - start
    rate = f", {tokens / seconds:.1f} tok/s" if tokens else ""
    already = f", {answers.already:,} answered already" if answers.already else ""
    note(f"{format_count(count, 'line')} in {seconds:.1f} s{rate}{already}")
    if answers.failed:
        raise PromptError(
            f"{len(answers.failed)} of {answers.count} lines could not be answered",
            hint='Each has an "error" instead.',
        )
