"""Compiles the public JSON Schema test suite, and compares what its forms allow with jsonschema.

    pip download --no-deps --no-binary jsonschema jsonschema==4.26.0
    python tests/campaigns/schema_suite.py jsonschema-4.26.0.tar.gz

The source distribution of jsonschema holds the suite; a directory with its tests does, too. An
instance that is allowed although it is invalid is a fault. One that is refused although it is valid
may be written in another order of its properties, or with other blanks, than the form wants. Each
form also makes random texts, all of which have to be valid. Schemas have a server's limits.
"""

import argparse
import json
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import _WrappedReferencingError

sys.path.insert(0, str(Path(__file__).parent.parent / "text/form"))
from form_walks import compiled, has_form, random_text

from mixchat.base.errors import UsageError
from mixchat.text.form.constraint import StartConstraint
from mixchat.text.form.output_constraint import HASTY_S, checked_schema

DRAFT = "draft2020-12"
# In binary fractions, as Python computes, 90.0102 is no multiple of 0.0001.
KNOWN = ("written: multipleOf.json: by small number",)


def main() -> int:
    """Run the campaign and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", type=Path, help="the source distribution, or the directory tests")
    parser.add_argument("--texts", type=int, default=20, help="random texts of each form")
    options = parser.parse_args()
    campaign, began = Campaign(), time.monotonic()
    for name, group in groups(options.suite):
        campaign.judge(f"{name}: {group['description']}", group, options.texts)
    for table in (campaign.counts, campaign.refused):
        print(*(f"{count:6} {what}" for what, count in table.most_common()), sep="\n", end="\n\n")
    faults = [fault for fault in campaign.faults if not fault.startswith(KNOWN)]
    print(*faults, f"{len(faults)} faults in {time.monotonic() - began:.0f} s", sep="\n")
    return bool(faults)


class Campaign:
    """Counts what became of schemas, instances and texts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.faults: list[str] = []

    def judge(self, label: str, group: dict[str, Any], texts: int) -> None:
        """Compile a schema of the suite, and compare its form with its instances."""
        try:
            form = compiled(checked_schema(group["schema"], HASTY_S))
        except UsageError as error:
            self.counts["schemas refused"] += 1
            self.refused[_reason(str(error))] += 1
            return
        self.counts["schemas compiled"] += 1
        for test in group["tests"]:
            self._judge_instance(label, form, test)
        validator = Draft202012Validator(group["schema"])
        for seed in range(texts):
            text = random_text(form, seed)
            self.counts["texts without an end" if text is None else "texts"] += 1
            if text is not None and not _is_valid(validator, text):
                self.faults.append(f"written: {label}: {text[:100]!r}")
                break

    def _judge_instance(self, label: str, form: StartConstraint, test: dict[str, Any]) -> None:
        allowed = any(has_form(form, text) for text in spellings(test["data"]))
        verdict = "allowed" if allowed else "refused"
        self.counts[f"{'valid' if test['valid'] else 'invalid'} instances {verdict}"] += 1
        if allowed and not test["valid"]:
            self.faults.append(f"allowed: {label}: {test['description']}")


def groups(suite: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema with its instances, and the name of its file."""
    for name, content in files(suite):
        if not name.startswith("optional/"):  # there, validators differ
            yield from ((name, group) for group in json.loads(content))


def files(suite: Path) -> Iterator[tuple[str, bytes]]:
    if suite.is_dir():
        for path in sorted(suite.glob(f"{DRAFT}/**/*.json")):
            yield str(path).partition(f"{DRAFT}/")[2], path.read_bytes()
        return
    with tarfile.open(suite) as archive:
        for member in archive:
            if f"/json/tests/{DRAFT}/" in member.name and member.name.endswith(".json"):
                file = archive.extractfile(member)
                yield member.name.partition(f"{DRAFT}/")[2], file.read()


def spellings(instance: object) -> Iterator[str]:
    """Yield ways to write an instance."""
    for ascii_only in (False, True):
        yield json.dumps(instance, ensure_ascii=ascii_only)
    yield json.dumps(instance, separators=(",", ":"))


def _is_valid(validator: Draft202012Validator, text: str) -> bool:
    """Return whether a text is valid, or cannot be judged: Python's patterns are not all there."""
    try:
        return bool(validator.is_valid(json.loads(text)))
    except (RecursionError, re.error, _WrappedReferencingError):
        return True


def _reason(message: str) -> str:
    """Return an error without its place and its names."""
    return re.sub(r" at #[^:]*|['\"].*?['\"]|\d+", "", message)


if __name__ == "__main__":
    sys.exit(main())
