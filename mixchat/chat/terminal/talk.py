"""A chat in the terminal, from its first prompt to its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack

from mixchat.base.settings import data_dir
from mixchat.chat.terminal.active_chat import ActiveChat
from mixchat.chat.terminal.commands import completions, run_command
from mixchat.chat.terminal.open_chat import OpenChat
from mixchat.chat.terminal.prompt import ChatPrompt
from mixchat.chat.terminal.screen import Screen
from mixchat.chat.terminal.tool_permission import ask_permission


def talk(opened: OpenChat, files: Mapping[str, str], title: str, *, raw: bool, vi: bool) -> None:
    """Chat in the terminal. The texts of `files` go before the first question.

    title: says which model it is. The model of a new chat is loaded behind the prompt.
    """
    name = opened.name
    saving = opened.saving
    # A resumed chat shows its last turn first. A KV cache may take long to read.
    waits = opened.resumed is not None or saving.cache is not None
    behind = sys.stdout.isatty() and not waits and opened.models.prepare(name)
    if not behind:
        opened.open()
    screen = Screen(raw=raw)
    screen.say(f"{title}; /help shows the commands, Ctrl-D leaves")
    with ExitStack() as at_end:
        chat = ActiveChat(opened, screen, at_end)
        if opened.tools is not None:
            opened.tools.confirm = lambda name: ask_permission(screen, name)
        if not behind and chat.session.history:
            chat.show_last_turn()
        for source, text in files.items():
            chat.attach(source, text)
        history = data_dir() / "history" if saving.autosave else None
        warn = opened.reporter.note
        prompt = ChatPrompt(history, completions(chat), chat.status, vi=vi, warn=warn)
        if behind:
            # After the prompt is there, because Python's threads take turns.
            prompt.when_drawn(lambda: opened.start(prompt.end, prompt.redraw))
        chat.run(prompt, run_command)
        opened.raise_fault()
