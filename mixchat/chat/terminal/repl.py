"""The loop of the chat in the terminal, which reads a text, then runs a command or asks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mixchat.chat.terminal import commands
from mixchat.chat.terminal.active_chat import ActiveChat
from mixchat.chat.terminal.typeahead import unseen_keys

if TYPE_CHECKING:
    from mixchat.chat.terminal.prompt import ChatPrompt

# `/etc/hosts is empty` is a question, `/exit` is not. What has several lines is one, too, unless it
# is a system prompt.
_COMMAND = re.compile(r"/(\w*|\?)(?:[ \t]+(.*))?")
_SYSTEM = re.compile(r"/(?:set[ \t]+)?(system)[ \t]+(\S.*)", re.DOTALL)


class Repl:
    """Reads texts at a prompt, and acts on a chat."""

    def __init__(self, chat: ActiveChat, prompt: ChatPrompt) -> None:
        self._chat, self._prompt = chat, prompt
        self._about_to_leave = False

    def run(self) -> None:
        """Read and answer until Ctrl-D, `/bye`, or Ctrl-C twice."""
        while not self._chat.left:
            try:
                self._turn()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._after_ctrl_c()

    def _turn(self) -> None:
        draft, self._chat.draft = self._chat.draft, ""
        text = self._prompt.read(draft).strip()
        self._about_to_leave = False
        command = _COMMAND.fullmatch(text) or _SYSTEM.fullmatch(text)
        typed = not self._prompt.quoted and text != draft
        if typed and text.lower() in commands.LEAVING:
            self._chat.left = True
        elif command and typed:
            self._run_command(command[1], (command[2] or "").strip())
        elif text or self._chat.attached:
            self._prompt.history.command_ended(worked=True)  # of what only begins like one
            self._chat.ask(text, instead=bool(draft))

    def _run_command(self, name: str, argument: str) -> None:
        try:
            with unseen_keys():
                commands.run_command(self._chat, name, argument)
        except Exception as error:
            if self._chat.left:  # without a model
                raise
            self._chat.report(error)
            self._prompt.history.command_ended(worked=False)
        else:
            self._prompt.history.command_ended(worked=True)
        self._chat.count_figures()

    def _after_ctrl_c(self) -> None:
        """Leave at the second Ctrl-C at an empty line. Others clear it, or stop its text."""
        if self._prompt.sent:
            self._chat.stopped()
            return
        if self._about_to_leave and not self._prompt.typed:
            self._chat.left = True
            return
        self._about_to_leave = not self._prompt.typed
        if self._about_to_leave:
            self._chat.screen.say("(Ctrl-C again, Ctrl-D or /bye leaves)")
