"""Doubles for a chat: an engine that says what a script tells it, one token a character."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from character_tokens import character_bytes

from mixchat.base.model_config import Context
from mixchat.base.options import SamplingOptions
from mixchat.engine.stats import GenerationStats
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.text.thinking import ThinkingFormat

STOP = 0
KEY = ExpertKey(0, 0)
# Harmony's control tokens, each a private character.
_NAMES = ("channel", "message", "start", "end", "return", "call")
MARKS = {f"<|{name}|>": 0xE000 + place for place, name in enumerate(_NAMES)}


@dataclass
class Experts:
    """Two experts of one layer, of which the first is used, and held in RAM."""

    stats: ExpertStats = field(default_factory=ExpertStats)
    slots_by_tier: dict[str, int] = field(default_factory=lambda: {"host": 16})
    slots: int = 16
    is_filling: bool = False

    def tier(self, key: ExpertKey) -> str:
        return "host" if key == KEY else "disk"


@dataclass
class Config:
    eos_token_ids: tuple[int, ...] = (STOP,)
    vocab_size: int = 0x110000
    largest_context: int = 32768
    num_hidden_layers: int = 1
    num_local_experts: int = 2
    num_moe_layers: int = 1


class ScriptedEngine:
    """Gives the answers of `script` one after the other, each followed by the stop token.

    Where a script holds an exception in place of a character, it is raised there.
    """

    def __init__(self, *script: str | Sequence[Any], context_size: int = 1000) -> None:
        self.script = list(script)
        self.context_size = context_size
        self.config = Config()
        self.identity = "scripted"
        self.stats = GenerationStats()
        self.experts, self.blueprint = Experts(), SimpleNamespace(expert_count=32)
        self.slots_by_tier, self.expert_bytes = self.experts.slots_by_tier, 16_000_000
        self.passes = SimpleNamespace(total_tokens=1, total_seconds=1.0)
        self.prompts: list[list[int]] = []
        self.samplings: list[Any] = []
        self.constraints: list[Any] = []
        self.closed = 0  # answers
        self.is_closed = False

    @property
    def context(self) -> Context:
        return Context(self.context_size, self.config.largest_context)

    def forget(self) -> None:
        """Nothing is held."""

    def held(self) -> tuple[list[int], None]:
        return [], None

    def close(self) -> None:
        self.is_closed = True

    def generate(
        self,
        prompt_ids: Any,
        *,
        sampling: Any,
        stop_ids: Any,
        max_tokens: int | None = None,
        constraint: Any = None,
        on_prefill: Any,
    ) -> Iterator[int]:
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        self.constraints.append(constraint)
        self.stats = GenerationStats(len(prompt_ids), prefill_seconds=0.5, decode_seconds=0.25)
        room = self.context_size - len(prompt_ids)
        try:
            for item in [*self.script.pop(0), chr(STOP)]:
                if isinstance(item, BaseException):
                    raise item
                if self.stats.generated_tokens in (room, max_tokens):
                    return
                self.stats.generated_tokens += 1
                for counts in (self.experts.stats, self.stats.experts):
                    counts.hits[KEY] += 3
                    counts.misses[KEY] += 1
                    counts.bytes_moved += 1000
                yield ord(item)
        finally:
            self.closed += 1


class CharacterTokenizer:
    """A token is a character's code point; 0 is the control token that ends an answer."""

    control_tokens = MARKS
    token_bytes = character_bytes({STOP, *MARKS.values()})

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_template(self, text: str, inserts: Any = None) -> list[int]:
        for mark, token in MARKS.items():
            text = text.replace(mark, chr(token))
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        hidden = (STOP, *MARKS.values())
        return "".join(chr(token) for token in ids if token not in hidden)


@dataclass
class PlainTemplate:
    """`[user]Hi[assistant]Hello[user]...`, with the ids of an answer if it has some."""

    continues_prompt: bool = False
    stop_ids: frozenset[int] = field(default=frozenset({STOP}))
    thinking: ThinkingFormat | None = None
    prefix: str = ""  # before an answer
    variables: list[Any] = field(default_factory=list)  # of each prompt

    def encode(self, messages: Sequence[Any], variables: Any = None) -> list[int]:
        self.variables.append(variables)
        ids: list[int] = []
        for message in messages:
            own = message.content_ids or [ord(c) for c in message.content]
            ids += [ord(c) for c in f"[{message.role}]"] + list(own)
        return ids + [ord(c) for c in self.prefix]


class TinyTemplate:
    """Ids of a vocabulary of 97: 4 before a question, 5 before an answer, 2 ends one."""

    continues_prompt = False
    stop_ids = frozenset({2})
    thinking = None

    def encode(self, messages: Sequence[Any], variables: Any = None) -> list[int]:
        ids = [1]
        for message in messages:
            own = message.ids or [10 + ord(character) % 80 for character in message.content]
            ids += [4, *own, 5] if message.role == "user" else own
        return ids


def make_session(*script: str | Sequence[Any], **options: Any) -> Any:
    """A `ChatSession` with a scripted engine; it is `session.engine`."""
    from mixchat.base.options import ChatOptions
    from mixchat.chat.engine_backend import EngineBackend
    from mixchat.chat.session import ChatSession

    backend = EngineBackend(
        ScriptedEngine(*script, context_size=options.pop("context_size", 1000)),
        CharacterTokenizer(),
        PlainTemplate(
            continues_prompt=options.pop("continues_prompt", False),
            thinking=options.pop("thinking", None),
            prefix=options.pop("prefix", ""),
        ),
        advised_tokens=options.pop("advised_tokens", None),
        form=options.pop("form", None),
    )
    seed = options.pop("sampling_seed", None)
    sampling = options.pop("sampling", SamplingOptions(seed=seed))
    return ChatSession(backend, sampling, ChatOptions(**options))
