"""The contract between those who ask and the service that answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from mixchat.base.errors import ResourceError
from mixchat.base.options import SamplingOptions
from mixchat.chat.answer import Reason

if TYPE_CHECKING:
    from mixchat.base.model_config import Context
    from mixchat.engine.sampling import Constraint
    from mixchat.text.template import Template
    from mixchat.text.thinking import ThinkingFormat, ThinkingParser
    from mixchat.text.tokenizer import Tokenizer
    from mixchat.text.tool_call import CallDelta, Tool
    from mixchat.text.tool_formats import ToolFormat


@dataclass(frozen=True)
class Job:
    """A prompt, and how to answer it.

    top_logprobs is the number of likeliest tokens to report with each token. 0 reports only its own
    log probability, None nothing. The last `begun` ids of the prompt begin the answer, which may
    call the tools `offered` in the form `tools`. `constraint` gets the parser of the answer.
    """

    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    sampling: SamplingOptions
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    constraint: Callable[[ThinkingParser], Constraint] | None = None
    continues_prompt: bool = False
    thinking: ThinkingFormat | None = None
    begun: int = 0
    tools: ToolFormat | None = None
    offered: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability before sampling, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reading:
    """So many of the prompt's uncached tokens are processed."""

    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """The next piece of text or calls, and the tokens since the last piece if requested."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    thinking: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer. A stop token counts as generated, and so does thinking."""

    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    thinking_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The answer cannot be given or finished."""

    error: Exception


JobEvent: TypeAlias = "Reading | Delta | Done | Failed"
Sink: TypeAlias = "Callable[[JobEvent], object]"


class QueueFullError(ResourceError):
    """Too many jobs are waiting."""


class ShuttingDownError(ResourceError):
    """The service is ending."""


@dataclass(frozen=True)
class ServiceStats:
    """The counts of a service since its start.

    running and waiting are jobs now. prompt_tokens does not count cached_tokens.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    busy_seconds: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0
    bytes_moved: int = 0

    def plus(self, other: ServiceStats) -> ServiceStats:
        return ServiceStats(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def with_tokens(self, prompt: int, cached: int, generated: int) -> ServiceStats:
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + prompt,
            cached_tokens=self.cached_tokens + cached,
            generated_tokens=self.generated_tokens + generated,
        )

    def with_end(self, last: Done | Failed) -> ServiceStats:
        if isinstance(last, Failed):
            return replace(self, failed=self.failed + 1)
        if last.reason == "interrupted":
            return replace(self, cancelled=self.cancelled + 1)
        return replace(self, finished=self.finished + 1)


class Service(Protocol):
    """A loaded model that answers several jobs at once. Any thread may call it.

    most_jobs counts those that run and those that wait.
    """

    name: str
    most_jobs: int
    context: Context
    tokenizer: Tokenizer
    template: Template

    def submit(self, *jobs: tuple[Job, Sink]) -> Callable[[], None]:
        """Queue all jobs or none, and return a function that cancels them at any time.

        The service's thread calls a job's sink with each event, which must not raise. The last one
        is `Done` or `Failed`. Raises `QueueFullError`, `ShuttingDownError`, and `PromptError` if a
        prompt leaves no room for an answer.
        """

    def stats(self) -> ServiceStats:
        """Return the counts as they are now."""

    def close(self) -> None:
        """Take no more jobs, and cancel the others."""
