"""Completes the names of models and chats, and other values of flags, in a shell."""

from __future__ import annotations

import re
from collections.abc import Callable

from mixchat.base.errors import MixchatError

# Other characters have a meaning in some shell.
_HARMLESS = re.compile(r"[\w.,+@%/-]+")


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Return a completion to one of these words."""

    def completions(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completions


def runnable_models(incomplete: str) -> list[str]:
    """Complete to a fixed name or a model on this machine."""
    from mixchat.install.known_models import ALIASES
    from mixchat.install.models import DEMO, names_here

    return one_of(*dict.fromkeys([*ALIASES, DEMO, *names_here()]))(incomplete)


def models_here(incomplete: str) -> list[str]:
    """Complete to a model on this machine."""
    from mixchat.install.models import names_here

    # The known ones are left out: `rm` offered models that nobody had installed.
    return one_of(*names_here())(incomplete)


def known_shapes(incomplete: str) -> list[str]:
    """Complete to a known model, for its shapes."""
    from mixchat.install.known_models import KNOWN

    return one_of(*KNOWN)(incomplete)


def kept_prompts(incomplete: str) -> list[str]:
    """Complete to the name of a prompt that is kept."""
    from mixchat.chat.named_prompts import prompt_names

    return one_of(*prompt_names())(incomplete)


def saved_chats(incomplete: str) -> list[str]:
    """Complete to a chat's name or ID, the newest first."""
    from mixchat.chat.saved.chat_store import ChatStore

    try:
        chats = ChatStore().all()
        names = [chat.name for chat in chats if chat.name and _HARMLESS.fullmatch(chat.name)]
        return one_of(*names, *(chat.id for chat in chats))(incomplete)
    except MixchatError:
        return []
