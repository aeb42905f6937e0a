"""`mixchat` as a program of its own, with a scripted engine in place of a model.

SCRIPT in the environment is a JSON list of answers. An answer is text, or a list of characters
and of {"raise": "RuntimeError", "with": "text"}. DELAY is a pause before each token, in seconds.
PROMPTS is a file to which each prompt is written.
"""

import builtins
import json
import os
import sys
import time
import types
from pathlib import Path

import mixchat.errors

sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
import chat_doubles
from chat_doubles import make_session

# In place of the real module, which imports torch: that would cost two seconds a process.
LIGHT_SAMPLING = types.SimpleNamespace(SamplingOptions=chat_doubles.SamplingOptions)


def answers():
    for answer in json.loads(os.environ.get("SCRIPT", '["Hello"]')):
        yield [make_error(item) if isinstance(item, dict) else item for item in answer]


def make_error(spec):
    module = mixchat.errors if hasattr(mixchat.errors, spec["raise"]) else builtins
    return getattr(module, spec["raise"])(spec["with"])


def open_fake(opening):
    session = make_session(
        *answers(),
        context_size=opening.context_size or 1000,
        system=opening.system,
        sampling=opening.sampling.options(),
        max_tokens=opening.max_tokens,
        stop=opening.stop,
        overflow=opening.overflow,
    )
    if delay := float(os.environ.get("DELAY", "0")):
        slow_down(session.engine, delay)
    if path := os.environ.get("PROMPTS"):
        record(session.engine, path)
    return session


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
    from mixchat.cli.app import run
    from mixchat.cli.opening import Opening

    sys.modules["mixchat.engine.sampling"] = LIGHT_SAMPLING
    Opening.open = open_fake
    run(sys.argv[1:])
