"""The prompt at which a person types, with history, completion, an editor and a status line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggest, Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER, EditingMode
from prompt_toolkit.filters import (
    Condition,
    emacs_insert_mode,
    emacs_mode,
    has_focus,
    vi_insert_mode,
    vi_navigation_mode,
)
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.vi_state import InputMode
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.styles import Style

from mixchat.base.errors import MixchatError
from mixchat.base.sanitize import VISIBLE, sanitize
from mixchat.chat.printing import PROMPT, WORDS, say
from mixchat.chat.terminal.completion import CommandCompleter, CommandCompletion
from mixchat.chat.terminal.folded_paste import FoldedPastes
from mixchat.chat.terminal.input_history import InputHistory
from mixchat.chat.terminal.other_programs import edited
from mixchat.chat.terminal.status_line import cut
from mixchat.chat.terminal.typeahead import reading_keys

_PROMPT = ">>> "
_CONTINUED = "... "
_QUOTES = '"""'
_ESC_TIMEOUT_S = 0.05  # until Esc is a key by itself in vi mode, not the start of an arrow key

_STYLE = Style.from_dict(
    {
        "prompt": PROMPT.replace("green", "ansigreen"),
        "words": WORDS.replace("green", "ansigreen"),
        # Not bright black, which some themes have as background.
        "auto-suggestion": "#808080 italic",
    }
)


class ChatPrompt:
    """Reads one text after the other from the terminal.

    `history` is the file of earlier texts, or None for memory alone. `commands` has the completions
    after a `/`. `status` returns the plain text of the status line at every key, so it has to be
    fast. `warn` is called, between prompts, if the history's file or the editor fails.
    """

    def __init__(
        self,
        history: Path | None,
        commands: Mapping[str, CommandCompletion],
        status: Callable[[], str],
        vi: bool = False,
        warn: Callable[[str], object] = say,
    ) -> None:
        self.typed = False  # there was text when Ctrl-C was pressed
        self.sent = False  # the last text was sent, so a Ctrl-C stops its answer
        self.quoted = False  # the last text was in quotes, so it is not a command
        self._warn = warn
        self._to_editor = False
        self._error: BaseException | None = None  # that ends the prompt
        self._pastes = FoldedPastes()
        self.history = InputHistory(history, self._pastes.whole)
        self._warned = False

        def bottom_line() -> StyleAndTextTuples:
            app = get_app()
            text = sanitize(status()).replace("\n", " ").replace("\t", " ")
            if app.editing_mode == EditingMode.VI:
                # As bash can show it, because the keys of both modes look alike.
                normal = app.vi_state.input_mode == InputMode.NAVIGATION
                text = f"{'[normal]' if normal else '[insert]'} {text}"
            return [("", cut(text, app.output.get_size().columns))]

        self._session = PromptSession[str](
            history=self.history,
            completer=CommandCompleter(commands),
            # Room for the menu is reserved only if there may be one.
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            auto_suggest=_GhostText(self.history),
            # The mark before a new line. A line that is wrapped has none.
            prompt_continuation=lambda width, line, wraps: [
                ("class:prompt", " " * width if wraps else _CONTINUED)
            ],
            bottom_toolbar=bottom_line,
            key_bindings=self._keys(),
            vi_mode=vi,
            enable_suspend=True,
            style=_STYLE,
            input_processors=[_VisibleText(), self._pastes],
        )
        if vi:
            self._session.app.ttimeoutlen = _ESC_TIMEOUT_S

    def when_drawn(self, do: Callable[[], None]) -> None:
        """Call `do` whenever the prompt was drawn."""
        self._session.app.after_render += lambda app: do()

    def redraw(self) -> None:
        """Draw the prompt again. Any thread may call it."""
        self._session.app.invalidate()

    @contextmanager
    def notes_above(self) -> Iterator[None]:
        """Print above the prompt what other threads write to standard output and error.

        prompt-toolkit lets the terminal read lines meanwhile. An Enter of that moment became
        Ctrl-J, which adds a line. A note reads nothing, so keys are left as they are.
        """
        source = vars(self._session.app.input)
        source["cooked_mode"] = nullcontext
        try:
            with patch_stdout(raw=True):
                yield
        finally:
            del source["cooked_mode"]

    def end(self, error: BaseException) -> None:
        """End this prompt, or the next one, with an error. Any thread may call it.

        What was typed becomes an entry of the history.
        """
        self._error = error
        with suppress(AttributeError, RuntimeError):  # no prompt now
            self._session.app.loop.call_soon_threadsafe(self._end)  # type: ignore[union-attr]

    def _end(self) -> None:
        app = self._session.app
        if self._error is not None and app.is_running and not app.is_done:
            self._session.default_buffer.append_to_history()
            app.exit(exception=self._error)

    def read(self, default: str = "") -> str:
        """Return the text, which the user edits from `default`, without newlines at its end.

        Raises `EOFError` at Ctrl-D on an empty line, and `KeyboardInterrupt` at Ctrl-C, also at one
        that comes right after the text is `sent`.
        """
        self.typed = self.sent = self.quoted = False
        self._warn_of_history()
        text = self._ask(default)
        while self._to_editor:
            try:
                text = edited(_encodable(text))
            except MixchatError as error:
                self._warn(f"{error}. {error.hint}" if error.hint else str(error))
            text = self._ask(text)
        self._warn_of_history()
        within = quoted_text(text)
        self.quoted = within is not None
        return _encodable(text if within is None else within).rstrip("\n")

    def _ask(self, default: str) -> str:
        self._to_editor = self._session.app.erase_when_done = False
        try:
            with reading_keys(self._session.app.input):
                text = self._pastes.whole(
                    self._session.prompt(
                        [("class:prompt", _PROMPT)], default=default, pre_run=self._end
                    )
                )
                self.sent = bool(text.strip()) and not self._to_editor
            return text
        except KeyboardInterrupt:
            self.typed = bool(self._session.default_buffer.text)
            raise

    def _warn_of_history(self) -> None:
        if self.history.fault and not self._warned:
            self._warned = True
            self._warn(self.history.fault)

    def _keys(self) -> KeyBindings:
        def within_quotes() -> bool:
            """Return whether quotes were opened and not closed, so that Enter adds a line."""
            inner = _after_quotes(get_app().current_buffer.text)
            return inner is not None and not inner.endswith(_QUOTES)

        def goes_further() -> bool:
            """Return whether a directory was taken, so that Enter offers its files."""
            state = get_app().current_buffer.complete_state
            chosen = state.current_completion if state else None
            return chosen is not None and chosen.text.endswith("/")

        def is_the_only_one() -> bool:
            """Return whether the only completion was taken, which another Tab would take back."""
            state = get_app().current_buffer.complete_state
            return bool(state and state.current_completion and len(state.completions) == 1)

        def add_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        def paste(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text(self._pastes.folded(event.data))

        def complete_further(event: KeyPressEvent) -> None:
            """Keep the completion, and offer what can follow it, such as files in a directory."""
            event.current_buffer.complete_state = None
            event.current_buffer.start_completion()

        def leave_for_editor(event: KeyPressEvent) -> None:
            """End the prompt, and erase it. The next one starts with the editor's text."""
            self._to_editor = event.app.erase_when_done = True
            event.app.exit(result=event.current_buffer.text)

        keys = KeyBindings()
        focused = has_focus(DEFAULT_BUFFER)
        inserting = focused & (emacs_insert_mode | vi_insert_mode)
        # The prompt takes colours, typed or pasted as \x1b[31m, for a mouse, and fails.
        keys.add(Keys.Vt100MouseEvent)(lambda event: None)
        keys.add(Keys.BracketedPaste, filter=focused)(paste)
        keys.add("c-j", filter=inserting)(add_line)
        # In vi mode this is Esc and then Enter, which sends the text as in every shell.
        keys.add("escape", "enter", filter=inserting & emacs_mode)(add_line)
        keys.add("enter", filter=inserting & Condition(within_quotes))(add_line)
        keys.add("enter", filter=focused & Condition(goes_further))(complete_further)
        keys.add("tab", filter=focused & Condition(is_the_only_one))(complete_further)
        keys.add("c-x", "c-e", filter=focused & emacs_mode)(leave_for_editor)
        keys.add("v", filter=focused & vi_navigation_mode)(leave_for_editor)
        return keys


class _GhostText(AutoSuggest):
    """Shows what the history suggests behind the typed text."""

    def __init__(self, history: InputHistory) -> None:
        self._history = history

    def get_suggestion(self, buffer: Buffer, document: Document) -> Suggestion | None:
        return Suggestion(self._history.suggested(document.text.rpartition("\n")[2]))


def quoted_text(text: str) -> str | None:
    """Return the inner text of `QQQtextQQQ`, of one line or many, None for other texts.

    QQQ stands for three double quotes. Quotes that are closed before the first line ends are part
    of an ordinary text.
    """
    inner = _after_quotes(text)
    if inner is None or not inner.endswith(_QUOTES):
        return None
    return inner.removesuffix(_QUOTES).removeprefix("\n").removesuffix("\n")


def _after_quotes(text: str) -> str | None:
    """Return what follows the quotes at the beginning, None without any."""
    body = text.strip()
    if not body.startswith(_QUOTES):
        return None
    inner = body.removeprefix(_QUOTES)
    first, newline, _ = inner.partition("\n")
    at = first.find(_QUOTES)
    closes_early = at >= 0 and (newline or at + len(_QUOTES) < len(first))
    return None if closes_early else inner


class _VisibleText(Processor):
    """Shows a person's words in their colour, and bidi controls as visible characters."""

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        """Replace one character by one, so that the cursor stays in its place."""
        shown: StyleAndTextTuples = []
        for style, text, *_ in transformation_input.fragments:
            words = style if "auto-suggestion" in style else f"class:words {style}"
            shown.append((words, text.translate(VISIBLE)))
        return Transformation(shown)


def _encodable(text: str) -> str:
    """Return `text` with `?` for each byte that was not UTF-8."""
    # prompt-toolkit reads such a byte as a lone surrogate, which no file takes.
    return text.encode("utf-8", "replace").decode("utf-8")
