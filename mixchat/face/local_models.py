"""The models of this machine, for `mixchat run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mixchat.base.context import Context
from mixchat.base.errors import MixchatError, UsageError
from mixchat.base.model_config import MAX_DEFAULT_TOKENS
from mixchat.base.options import LoadOptions
from mixchat.base.progress import Reporter
from mixchat.base.settings import report_path_by_key
from mixchat.face.load import check_model, find_or_build, open_model, recommending
from mixchat.face.reading_time import Predictor

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.face.request import ChatModel
    from mixchat.text.template import Template

_MAX_CONTEXT = Context(MAX_DEFAULT_TOKENS, MAX_DEFAULT_TOKENS, is_chosen=False)


class LocalModels:
    """The `ModelProvider` of models that are loaded here.

    usual: the one if none is named. Without it a model has to be named where one is needed.
    is_set: whether a person has set the usual one.
    """

    place = "on this machine"

    def __init__(
        self, load: LoadOptions, reporter: Reporter, *, usual: str | None, is_set: bool = True
    ) -> None:
        self._load = load
        self._reporter = reporter
        self._usual = usual
        self._is_set = is_set
        self._is_named = True

    def choose(self, name: str | None, resumed: str | None, *, from_server: bool) -> str:
        """Return a model. The usual one continues a server's chat whose model is unknown here.

        Raises `UsageError` if one has to be named.
        """
        from mixchat.install.models import default_model, is_model

        if name is not None:
            return name
        if resumed is None or (from_server and not is_model(resumed)):
            self._is_named = self._is_set
            return self._usual or default_model()
        return resumed

    def context_of(self, name: str) -> Context:
        """Return the largest context that a model may get, the usual one until it is installed.

        Raises `UsageError` for a size that the model cannot do.
        """
        from mixchat.install.models import installed_directory
        from mixchat.weights.families.read_config import read_config_file

        try:
            config = read_config_file(installed_directory(name) / "config.json")
        except MixchatError:  # `open` raises it again, or builds the demo
            return _MAX_CONTEXT
        if self._load.context_size is None:
            return Context(config.default_contexts[-1], config.largest_context, is_chosen=False)
        return Context.of(config, self._load.context_size)

    def prepare(self, name: str) -> bool:
        """Raise `ModelNotFoundError` if there is no such model. A missing demo is built."""
        with recommending(self._is_named):
            find_or_build(name, self._reporter)
        return True

    def open(
        self,
        name: str,
        least_context: Callable[[Template], int] = lambda template: 0,
        **model_options: Any,
    ) -> Model:
        """Load a model. `model_options` are of `Model`."""
        with recommending(self._is_named):
            return open_model(
                name, self._load, self._reporter, least_context=least_context, **model_options
            )

    def predictor(self, model: ChatModel, name: str) -> Predictor:
        from mixchat.install.models import installed_directory
        from mixchat.loading.loader import speed_predictor

        engine = cast("Model", model).engine
        return speed_predictor(installed_directory(name), self._load.device, engine)

    def others(self, current: str) -> list[str]:
        from mixchat.install.models import other_models

        return list(other_models(current))

    def check(self, name: str, current: str) -> None:
        """Raise `MixchatError` if a chat cannot change. The demo is built for it."""
        from mixchat.install.models import find_installed

        directory = find_or_build(name, self._reporter)
        if directory == find_installed(current):
            raise UsageError(f"this chat already has the model {name}")
        with self._reporter.status(f"checking {name}"):
            check_model(directory, self._load)


def report_path(name: str) -> Path:
    """Return the path of the report for a model's name. Raises as `resolve` does."""
    from mixchat.install.models import resolve

    return report_path_by_key(resolve(name).key)
