"""Milliseconds that holding an answer to a form costs a token, by the vocabulary.

    python tests/benchmarks/forms.py [--model NAME]              (demo, which has to be installed)

For the tokenizer of an installed model, and for Mixtral's own, which mistral-common brings along.
`mask` is what llguidance takes, with the way from its process to torch, `logits` the masking of the
logits, `accept` the step behind the token.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mistral_common
import torch

from mixchat.engine.sampling import only
from mixchat.install.models import installed_directory
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.text.form.constraint import ConstraintCompiler
from mixchat.text.form.output_constraint import checked, checked_schema
from mixchat.text.tokenizer import Tokenizer

MIXTRAL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
TEXT = (
    '{"name": "Grace Brewster Murray Hopper", "age": 85, "tags": ["navy", "compiler", "COBOL"], '
    '"story": "She said: \\"A ship in port is safe\\", and wrote the A-0 system in 1952."}'
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "story": {"type": "string", "maxLength": 300},
    },
    "required": ["name", "age", "tags", "story"],
    "additionalProperties": False,
}
FORMS = {
    "any object": checked_schema({"type": "object"}),
    "schema": checked_schema(SCHEMA),
    "grammar": checked("lark", 'start: "{" (WORD | /[^a-z]/)* "}"\nWORD: /[a-z]{1,20}/'),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(MIXTRAL, Path(directory) / "tokenizer.model")
        for name, place in (
            (options.model, installed_directory(options.model)),
            ("Mixtral", Path(directory)),
        ):
            with opened(place) as tokenizer:
                measure(name, tokenizer, options.repeats)


@contextmanager
def opened(directory: Path) -> Iterator[Tokenizer]:
    text = CheckpointText(directory)
    try:
        yield text.tokenizer()
    finally:
        text.close()


def measure(name: str, tokenizer: Tokenizer, repeats: int) -> None:
    seconds: dict[str, list[float]] = defaultdict(list)
    stop = tokenizer.eos_id or 0
    compiler = timed(seconds["all tokens"], lambda: ConstraintCompiler(tokenizer, {stop}))
    print(f"{name}: {tokenizer.vocab_size} tokens, {milliseconds(seconds['all tokens'])} once")
    logits, ids = torch.randn(tokenizer.vocab_size), tokenizer.encode(TEXT)
    for kind, form in FORMS.items():
        steps: dict[str, list[float]] = defaultdict(list)
        compiled = timed(steps["compile"], lambda form=form: compiler.compile(form))
        for _ in range(repeats):
            constraint = timed(steps["start"], compiled)
            for token in ids:
                mask = timed(steps["mask"], constraint.allowed)
                assert mask[token], (kind, token)
                timed(steps["logits"], lambda mask=mask: only(logits, mask))
                timed(steps["accept"], lambda token=token, to=constraint: to.accept(token))
        print(f"  {kind:10}", *(f"{step} {milliseconds(taken)}" for step, taken in steps.items()))


def timed(into: list[float], call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = call()
    into.append(time.perf_counter() - began)
    return result


def milliseconds(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0] * 1e3:.1f} ms"
    middle, mean = statistics.median(seconds) * 1e3, statistics.mean(seconds) * 1e3
    return f"{middle:.3f} ms (mean {mean:.3f})"


if __name__ == "__main__":
    main()
