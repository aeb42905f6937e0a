"""`mixchat` as a program of its own, with a scripted engine in place of a model.

SCRIPT in the environment is a JSON list of answers. An answer is text, or a list of characters
and of {"raise": "RuntimeError", "with": "text"}. DELAY is a pause before each token, in seconds.
PROMPTS is a file to which each prompt is written. THINKING is the format in which the answers
think, and the variables of their template. NOTE is a note of loading, LOADING a pause before
the engine is there, and FAULT the text of the error that loading ends with then.
"""

import builtins
import json
import os
import sys
import time
import types
from pathlib import Path

import mixchat.base.errors

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
from chat_doubles import (
    CharacterTokenizer,
    PlainTemplate,
    ScriptedEngine,
    ScriptedForms,
    ScriptedModel,
)

from mixchat.face.model import Model, ModelText
from mixchat.text.thinking import ThinkingFormat


def answers():
    for answer in json.loads(os.environ.get("SCRIPT", '["Hello"]')):
        yield [make_error(item) if isinstance(item, dict) else item for item in answer]


def make_error(spec):
    module = mixchat.base.errors if hasattr(mixchat.base.errors, spec["raise"]) else builtins
    return getattr(module, spec["raise"])(spec["with"])


def thinking():
    words = os.environ.get("THINKING", "").split()
    return ThinkingFormat(words[0], tuple(words[1:])) if words else None


def scripted(load):
    """The engine of the environment's script, and the text side of its model."""
    engine = ScriptedEngine(*answers(), context_size=load.context_size or 1000)
    engine.delay = float(os.environ.get("DELAY", "0"))
    engine.prompts_file = os.environ.get("PROMPTS")
    return engine, ModelText(CharacterTokenizer(), PlainTemplate(thinking=thinking()))


def open_fake(name, load, reporter, *, least_context=None, shown=True):
    """A model without a thread, for commands that run in the test's process."""
    return ScriptedModel(*scripted(load))


def open_with_thread(name, load, reporter, *, least_context=None, shown=True):
    engine, text = scripted(load)
    if note := os.environ.get("NOTE"):
        reporter.note(note)
    time.sleep(float(os.environ.get("LOADING", "0")))
    if fault := os.environ.get("FAULT"):
        raise mixchat.base.errors.CheckpointError(fault)
    model = Model(name, lambda: engine, text)
    # A grammar over a million tokens takes minutes, and the script is held to none.
    model._prompts._forms = ScriptedForms()
    return model


def find_fake(name, reporter):
    """Every model is installed."""


def predict_fake(models, model, name):
    measured_at = time.time() - 3 * 86400 - 5
    made = types.SimpleNamespace(
        tokens_per_second=21.0,
        speeds=types.SimpleNamespace(measured_at=measured_at),
        prompt=lambda tokens, cold: types.SimpleNamespace(seconds=tokens / (4 if cold else 2)),
    )
    return lambda: made


SERVED = set()  # the models of a server on this machine


def is_served(model):
    """A server that really runs on this machine is none of the tests' business."""
    return model in SERVED


def main(arguments):
    from mixchat.cli import app, run
    from mixchat.face import local_models

    local_models.open_model = open_with_thread
    local_models.find_or_build = find_fake
    local_models.LocalModels.predictor = predict_fake
    run.is_served_here = is_served
    app.run(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
