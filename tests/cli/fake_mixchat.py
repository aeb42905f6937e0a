"""`mixchat` as a program of its own, with a scripted engine in place of a model.

SCRIPT in the environment is a JSON list of answers. An answer is text, or a list of characters
and of {"raise": "RuntimeError", "with": "text"}. DELAY is a pause before each token, in seconds.
PROMPTS is a file to which each prompt is written. THINKING is the format in which the answers
think, and the variables of their template.
"""

import builtins
import json
import os
import sys
import time
import types
from pathlib import Path

import mixchat.base.errors

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
from chat_doubles import make_session

from mixchat.sessions.opening import resolve_sampling
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


def open_fake(model, load, options, reporter, form=None, **saved):
    session = make_session(
        *answers(),
        context_size=load.context_size or 1000,
        form=form,
        thinking=thinking(),
        **vars(options) | {"sampling": resolve_sampling(options.sampling, {})},
    )
    if delay := float(os.environ.get("DELAY", "0")):
        slow_down(session.engine, delay)
    if path := os.environ.get("PROMPTS"):
        record(session.engine, path)
    return session


def predict_fake(models, session, name):
    measured_at = time.time() - 3 * 86400 - 5
    decode = types.SimpleNamespace(low=18.0, high=21.0, measured_at=measured_at)
    from_disk, from_ram = (
        types.SimpleNamespace(low=4.0, high=8.0),
        types.SimpleNamespace(low=2.0, high=2.0),
    )
    made = types.SimpleNamespace(
        decode=lambda: decode, prompt=lambda tokens, cold: from_disk if cold else from_ram
    )
    return lambda: made


def note_nothing(model, reporter):
    """A server that runs on this machine is none of the tests' business."""


def slow_down(engine, delay):
    generate = engine.generate

    def slowly(*args, **options):
        for token in generate(*args, **options):
            time.sleep(delay)
            yield token

    engine.generate = slowly


def record(engine, path):
    generate = engine.generate

    def recorded(prompt_ids, **options):
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(map(chr, prompt_ids)) + "\n---\n")
        return generate(prompt_ids, **options)

    engine.generate = recorded


if __name__ == "__main__":
    from mixchat.cli import app, run
    from mixchat.sessions import local_models

    local_models.open_session = open_fake
    local_models.LocalModels.predictor = predict_fake
    run._note_server = note_nothing
    app.run(sys.argv[1:])
