"""Lets several processes resume one chat and answer at once; counts the turns that are in no file.

    python tests/campaigns/resume.py [--races 200] [--processes 2] [--real MODEL]

With `--real` each process is the command, `mixchat run --resume ID`, which takes seconds a race;
without, it is what that command does once the answer is there, for which only the disk is slow.
Exit code 0: no turn was lost, and each process but the first reported the change.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rig

sys.path.insert(0, str(rig.HERE.parent / "chat"))
CHANGED = "this chat was changed in another session; saved as "


def main() -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--real", metavar="MODEL")
    options = parser.parse_args()
    models = Path(os.environ.get("MIXCHAT_HOME", "")) / "models"
    began, lost, unreported, failed = time.monotonic(), 0, 0, 0
    with rig.workplace() as work:
        if options.real:
            (work / "home").mkdir()
            (work / "home/models").symlink_to(models.absolute())
        race = _real(options.real) if options.real else _quick
        _imported()
        for number in range(options.races):
            questions = [f"question {number} of {n}" for n in range(options.processes)]
            before = _begin(number)
            outputs = [work / f"out{n}" for n in range(options.processes)]
            codes = race(before, questions, outputs)
            failed += sum(code != 0 for code in codes)
            saved = _asked()
            lost += sum(question not in saved for question in questions)
            reported = sum(CHANGED in output.read_text() for output in outputs)
            unreported += options.processes - 1 - reported
    rig.table(
        f"{options.races} races of {options.processes}, {time.monotonic() - began:.0f} s",
        {
            "turns in no file": lost,
            "changes not reported": unreported,
            "processes that failed": failed,
        },
    )
    return 1 if lost or unreported or failed else 0


def _imported() -> None:
    import chat_doubles

    chat_doubles.make_session()


def _begin(number: int) -> str:
    """A chat of one turn, alone in the store; its ID."""
    from chat_doubles import make_session

    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore()
    for chat in store.all():
        store.remove(chat.id)
    session = make_session("Hello")
    list(session.ask(f"Begin {number}"))
    saver = ChatSaver(session, store, "demo")
    saver.save()
    return saver.chat.id


def _asked() -> set[str]:
    """Every question in any chat."""
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore()
    return {m.content for chat in store.all() for m in store.load(chat.id).messages}


def _quick(id: str, questions: list[str], outputs: list[Path]) -> list[int | None]:
    """Each process resumes the chat, answers, and saves it when all have answered."""
    gate, opened = os.pipe()
    arrivals, arrived = os.pipe()

    def turn(question: str) -> Callable[[], object]:
        def work() -> None:
            from chat_doubles import make_session

            from mixchat.chat.saved.chat_saver import ChatSaver
            from mixchat.chat.saved.chat_store import ChatStore
            from mixchat.chat.terminal.open_chat import find_chat
            from mixchat.cli.output.progress import TerminalReporter

            os.close(opened)
            session, reporter = make_session("An answer"), TerminalReporter()
            notes = {"warn": reporter.error, "note": reporter.note}
            saver = ChatSaver(session, ChatStore(), "demo", **notes)
            chat = find_chat(id)
            assert chat
            saver.resume(chat)
            list(session.ask(question))
            os.write(arrived, b".")
            os.read(gate, 1)  # until its other end is closed
            saver.save()

        return work

    pids = [
        rig.fork(turn(question), output)
        for question, output in zip(questions, outputs, strict=True)
    ]
    os.close(gate)
    os.close(arrived)
    # One that resumed the chat after another's save would rightly report no change.
    waiting = len(pids)
    while waiting and (came := os.read(arrivals, waiting)):
        waiting -= len(came)
    os.close(opened)
    os.close(arrivals)
    return [rig.wait(pid) for pid in pids]


def _real(model: str) -> Callable[[str, list[str], list[Path]], list[int | None]]:
    def race(id: str, questions: list[str], outputs: list[Path]) -> list[int | None]:
        command = [sys.executable, "-m", "mixchat", "run", "-m", model, "-n", "2", "--resume", id]

        def turn(question: str, output: Path) -> subprocess.Popen[bytes]:
            with open(output, "wb") as said:
                return subprocess.Popen(
                    [*command, question],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                )

        running = [turn(*each) for each in zip(questions, outputs, strict=True)]
        return [process.wait(300) for process in running]

    return race


if __name__ == "__main__":
    sys.exit(main())
