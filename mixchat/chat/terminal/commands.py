"""The commands after a `/`, each with its help, its completion and its function."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.base.context import UNKNOWN_CONTEXT
from mixchat.base.errors import ChatNotFoundError, PromptError, UsageError
from mixchat.base.output_file import OutputFile
from mixchat.base.quantities import format_count
from mixchat.base.sanitize import sanitize
from mixchat.chat import parameters
from mixchat.chat.named_prompts import prompt_names, prompts_dir, read_named_prompt
from mixchat.chat.plain_text import is_url, read_source
from mixchat.chat.printing import one_line, show
from mixchat.chat.saved.chat_text import chat_table, code_blocks, to_json, to_markdown
from mixchat.chat.terminal.completion import (
    CommandCompletion,
    CompleteArgument,
    file_argument,
    file_names,
)
from mixchat.chat.terminal.other_programs import copy

if TYPE_CHECKING:
    from mixchat.chat.terminal.active_chat import ActiveChat
    from mixchat.text.messages import Role

_PIPED_WIDTH = 80  # columns, without a terminal
_MAX_ABOUT = 100  # characters of a tool's description
_MAX_LISTED = 20  # chats that /chats lists
_KEYS = (
    'Alt-Enter, Ctrl-J  new line; or put """ before and after several lines',
    "Ctrl-X Ctrl-E      write in your editor",
    "Ctrl-R             search your earlier questions",
    "Ctrl-C             stop the answer; clear the line; twice on an empty one: leave",
    "/help COMMAND      more about a command, as in /help read",
)

Run = Callable[["ActiveChat", str], None]
Completes = Callable[["ActiveChat"], CompleteArgument]


@dataclass(frozen=True)
class Command:
    """A command. `run` is called with the chat and with the text after the name.

    `argument` is that text's name in /help. `help` has to fit into half a row of /help. `detail` is
    the longer text of `/help NAME`.
    """

    run: Run
    argument: str
    help: str
    detail: str
    completes: Completes | None = None


COMMANDS: dict[str, Command] = {}
COMMAND_ALIASES: dict[str, str] = {"?": "help", "exit": "bye", "quit": "bye"}


def _command(
    argument: str, help: str, detail: str, completes: Completes | None = None
) -> Callable[[Run], Run]:
    """Make a function the command of its name."""

    def add(run: Run) -> Run:
        COMMANDS[run.__name__.removeprefix("_")] = Command(run, argument, help, detail, completes)
        return run

    return add


def run_command(chat: ActiveChat, name: str, argument: str) -> None:
    """Run a command. Raises `MixchatError` if it fails, or if there is none of this name."""
    command = _find_command(name)
    if argument and not command.argument:
        raise UsageError(f"/{name} takes no argument, but got {argument!r}")
    command.run(chat, argument)


def _find_command(name: str) -> Command:
    command = COMMANDS.get(COMMAND_ALIASES.get(name, name))
    if command is not None:
        return command
    near = difflib.get_close_matches(name.lower(), [*COMMANDS, *COMMAND_ALIASES], 1)
    hint = f"Did you mean /{near[0]}?" if near else "/help shows them all."
    if name in parameters.NAMES:
        hint = f"Did you mean /set {name}?"
    raise UsageError(f"there is no command /{name}", hint=hint)


def help_text(width: int) -> str:
    """Return the commands and keys, the commands in two columns if `width` cells have room."""
    usages = {f"/{name} {c.argument}".rstrip(): c.help for name, c in COMMANDS.items()}
    longest = max(map(len, usages))
    lines = [f"{usage:{longest}}  {text}" for usage, text in usages.items()]
    column = max(map(len, lines)) + 2
    if 2 * column - 2 <= width:
        half = (len(lines) + 1) // 2
        rows = zip_longest(lines[:half], lines[half:], fillvalue="")
        lines = [f"{first:{column}}{second}".rstrip() for first, second in rows]
    return "\n".join([*lines, "", *_KEYS])


def completions(chat: ActiveChat) -> Mapping[str, CommandCompletion]:
    """Return how the prompt completes each command."""
    return {
        name: CommandCompletion(
            f"{command.argument}  {command.detail}".strip(),
            None if command.completes is None else command.completes(chat),
        )
        for name, command in COMMANDS.items()
    }


def _saved_chats(chat: ActiveChat) -> CompleteArgument:
    def complete(text: str) -> Iterable[tuple[str, str]]:
        """Return names and IDs, with the text for the menu."""
        saved_chats = chat.store.all()
        return [(w, saved.question) for saved in saved_chats for w in (saved.name, saved.id) if w]

    return complete


@_command(
    "[COMMAND]",
    "show this list",
    "show all commands, or explain one",
    lambda chat: lambda text: [*COMMANDS, *COMMAND_ALIASES],
)
def _help(chat: ActiveChat, argument: str) -> None:
    if not argument:
        chat.screen.say(help_text(chat.screen.width or _PIPED_WIDTH))
        return
    name = argument.lstrip("/")
    command = _find_command(name)
    usage = f"/{COMMAND_ALIASES.get(name, name)} {command.argument}".rstrip()
    chat.screen.say(f"{usage}  {command.detail}")


@_command("", "leave", "leave (also /exit, /quit, exit, quit, bye, Ctrl-D)")
def _bye(chat: ActiveChat, argument: str) -> None:
    chat.left = True


@_command("", "start a new chat", "start a new chat; the old one stays saved")
def _clear(chat: ActiveChat, argument: str) -> None:
    chat.start_new()
    chat.screen.say("(a new chat)")


@_command(
    "[NAME VALUE]",
    "set a parameter",
    "show the parameters, or change one: /set temp 0.2; /set temp none restores its default",
    lambda chat: parameters.completions,
)
def _set(chat: ActiveChat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name == "system":
        _system(chat, value.strip())
        return
    if not value.strip():
        values = parameters.values(chat.session)
        _say_table(chat, {name: values[name]} if name in values else values)
        return
    parameters.change(chat.session, name, value.strip())
    chat.saver.save()
    session = chat.session
    note = "takes effect with the next answer"
    if name == "think" and session.think in ("on", "off") and not session.model.can_skip_thinking:
        note = f"the model has no switch that turns thinking {session.think}"
        note += "; if it thinks, that is hidden" if session.think == "off" else ""
    chat.screen.say(f"({note})")


@_command("", "model and settings", "show model, chat, system prompt and parameters")
def _show(chat: ActiveChat, argument: str) -> None:
    session = chat.session
    saver = chat.saver
    rows = {
        "model": saver.model,
        "chat": f"{saver.chat.name or saver.chat.id}{'' if saver.autosave else ' (not saved)'}",
        "turns": str(sum(message.role == "user" for message in session.history)),
        "system": "none" if session.system is None else session.system,
        **session.model.about(),
    }
    _say_table(chat, {**rows, **parameters.values(session)})


def _say_table(chat: ActiveChat, rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    chat.screen.say("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


@_command(
    "[NAME]",
    "change the model",
    "show which model answers, or continue this chat with another one",
    lambda chat: lambda text: chat.other_models(),
)
def _model(chat: ActiveChat, argument: str) -> None:
    if argument:
        chat.change_model(parameters.unquoted(argument))
        return
    names = ", ".join(chat.other_models())
    more = f"also {chat.models.place}: {names}" if names else "there is no other one here"
    chat.screen.say(one_line(f"{chat.saver.model} ({more})"))


@_command("[TEXT]", "the system prompt", "show or change the system prompt (none: remove it)")
def _system(chat: ActiveChat, argument: str) -> None:
    if not argument:
        system = chat.session.system
        chat.screen.say("(no system prompt)" if system is None else system)
        return
    chat.session.system = None if argument.lower() == "none" else argument
    chat.saver.save()
    chat.screen.say("(takes effect with the next answer)")


@_command("[NAME]", "save under a name", "save this chat under a name")
def _save(chat: ActiveChat, argument: str) -> None:
    if not chat.session.history:
        raise PromptError("there is nothing to save yet")
    previous = chat.saver.chat
    chat.saver.rename(parameters.unquoted(argument) or None)
    saved = chat.saver.chat
    is_renamed = previous.name not in (None, saved.name) and previous.id == saved.id
    done = f"renamed from {shlex.quote(previous.name or '')}" if is_renamed else "saved"
    name = shlex.quote(saved.name or saved.id)
    chat.screen.say(f"({done}; mixchat run --resume {name} resumes it)")


@_command("ID or NAME", "resume a chat", "resume a saved chat", _saved_chats)
def _load(chat: ActiveChat, argument: str) -> None:
    if not argument:
        raise UsageError("/load needs a chat's ID or name", hint="/chats lists them.")
    chat.resume(chat.store.load(parameters.unquoted(argument)))


@_command("[WORD]", "list saved chats", "list the saved chats, or those that contain WORD")
def _chats(chat: ActiveChat, argument: str) -> None:
    word = parameters.unquoted(argument)
    saved = chat.store.all(word)
    if word and not saved:
        raise ChatNotFoundError(f"no saved chat has the text {word!r}")
    if not saved:
        chat.screen.say("(there are no saved chats yet)")
        return
    show(sanitize(chat_table(saved[:_MAX_LISTED], chat.screen.width)), chat.screen.out)
    if len(saved) > _MAX_LISTED:
        chat.screen.say(f"({len(saved) - _MAX_LISTED} more: mixchat chats)")


def _last(chat: ActiveChat, role: Role) -> str | None:
    history = reversed(chat.session.history)
    return next((message.content for message in history if message.role == role), None)


@_command(
    "[NAME]",
    "ask a kept prompt",
    "list the prompts of prompts/NAME.md, or ask one; what follows the name is its {{input}}",
    lambda chat: lambda text: prompt_names(),
)
def _prompt(chat: ActiveChat, argument: str) -> None:
    if not argument:
        names = ", ".join(prompt_names())
        chat.screen.say(one_line(names or f"(there are no prompts in {prompts_dir()})"))
        return
    name, *text = argument.split(maxsplit=1)
    context = chat.session.context or UNKNOWN_CONTEXT
    question = chat.with_files("".join(text))
    chat.ask(read_named_prompt(name).filled(question, context))


@_command("", "answer again", "answer the last question again, the same with temp 0")
def _regen(chat: ActiveChat, argument: str) -> None:
    chat.answer(chat.session.ask_again())


@_command("[n]", "remove turns", "remove the last turn, or the last n; /redo restores them")
def _undo(chat: ActiveChat, argument: str) -> None:
    try:
        count = int(argument or 1)
    except ValueError:
        count = 0
    if count < 1:
        raise UsageError(f"/undo takes a number of turns, 1 or more, not {argument!r}")
    chat.session.undo(count)
    chat.saver.save()
    turns = format_count(count, "turn")
    them = "it" if count == 1 else "them"
    chat.screen.say(f"({turns} removed; /redo restores {them}, until your next question)")


@_command("", "restore turns", "restore what the last /undo removed, until your next question")
def _redo(chat: ActiveChat, argument: str) -> None:
    count = chat.session.redo()
    if not count:
        hint = "/regen answers the last question again."
        raise PromptError("no turn was removed since the last answer", hint=hint)
    chat.saver.save()
    chat.screen.say(f"({format_count(count, 'turn')} restored)")


@_command("", "reword the question", "change the last question, and ask it instead")
def _edit(chat: ActiveChat, argument: str) -> None:
    question = _last(chat, "user")
    if question is None:
        raise PromptError("nothing has been asked yet")
    chat.draft = question


@_command("", "continue the answer", "continue the last answer")
def _continue(chat: ActiveChat, argument: str) -> None:
    chat.answer(chat.session.continue_answer(), _last(chat, "assistant") or "")


@_command(
    "[code]",
    "copy the answer",
    "copy the last answer, or its last code block",
    lambda chat: lambda text: ["code"],
)
def _copy(chat: ActiveChat, argument: str) -> None:
    if argument not in ("", "code"):
        raise UsageError("/copy copies the last answer, /copy code its last code block")
    text = _last(chat, "assistant")
    if text is None:
        raise PromptError("nothing has been answered yet")
    if argument == "code":
        blocks = code_blocks(text)
        if not blocks:
            raise PromptError("the last answer has no code block")
        text = blocks[-1]
    done = copy(text, chat.screen.out)
    chat.screen.say(f"({done}: {len(text):,} characters)")


@_command(
    "FILE",
    "ask about a file",
    "put the text of a file, PDF or web address before the next question; /read none drops all",
    lambda chat: file_names,
)
def _read(chat: ActiveChat, argument: str) -> None:
    if argument == "none":
        chat.attached.clear()
        chat.screen.say("(no file goes before the next question)")
        return
    if not argument:
        names = one_line(", ".join(chat.attached))
        raise UsageError("/read needs the name of a file", hint=names and f"Read so far: {names}.")
    source = argument if is_url(argument) else str(file_argument(argument))
    path = Path(source)
    if path.exists() and not path.is_file():  # nobody may ever write to a FIFO
        raise PromptError(f"{path} is not a file", hint="/read takes a file with text.")
    context = chat.session.context or UNKNOWN_CONTEXT
    text = read_source(source, context, lambda remark: chat.screen.say(f"({one_line(remark)})"))
    chat.attach(source, text)


@_command("", "tools of the model", "show the tools that --mcp offers, and which run unasked")
def _tools(chat: ActiveChat, argument: str) -> None:
    toolbox = chat.session.tools
    tools = () if toolbox is None else toolbox.tools
    if toolbox is None or not tools:
        chat.screen.say("(no tools; mixchat run --mcp FILE offers those of MCP servers)")
        return
    rows = {tool.name: one_line(tool.description or "")[:_MAX_ABOUT] for tool in tools}
    for name in toolbox.allowed & rows.keys():
        rows[name] = f"(runs unasked) {rows[name]}"
    _say_table(chat, rows)


@_command("", "room in the context", "show how full the context is")
def _tokens(chat: ActiveChat, argument: str) -> None:
    session = chat.session
    stats = chat.session.stats
    prompt = f"{stats.prompt_tokens:,}, {stats.reused_tokens:,} from the cache"
    if not stats.prompt_tokens and session.model.engine is None:
        prompt = "not told by the server"
    used = session.used_tokens
    context = session.context
    room = "not told by the server" if used is None else f"{used:,} tokens"
    if used is not None and context is not None:
        room = f"{used:,} of {context.tokens:,} tokens ({100 * used // context.tokens}%)"
    answer = f"{stats.generated_tokens:,}"
    _say_table(chat, {"context": room, "last prompt": prompt, "last answer": answer})


@_command("", "use of the experts", "show which experts were used, and where they are")
def _experts(chat: ActiveChat, argument: str) -> None:
    from mixchat.chat.draw.expert_table import expert_table
    from mixchat.engine.report import report_of

    report = report_of(chat.session.engine, chat.saver.model)
    chat.screen.say(expert_table(report))


@_command("", "Markdown off or on", "show answers as plain text, or as Markdown again")
def _raw(chat: ActiveChat, argument: str) -> None:
    chat.screen.raw = not chat.screen.raw
    form = "plain text" if chat.screen.raw else "Markdown"
    chat.screen.say(f"(answers are shown as {form})")


@_command(
    "[FILE]",
    "save as Markdown",
    "write the chat to a file, as Markdown or JSON (*.json)",
    lambda chat: file_names,
)
def _export(chat: ActiveChat, argument: str) -> None:
    if not chat.session.history:
        raise PromptError("there is nothing to export yet")
    current = chat.saver.current()
    path = file_argument(argument) if argument else Path(f"{current.id}.md")
    text = to_json(current) if path.suffix == ".json" else to_markdown(current)
    OutputFile("/export", path, streams=False).write(text.encode())
    chat.screen.say(f"(written to {one_line(str(path))})")
