"""Chat templates and tokenizers that loop, grow, abort or crash: what the sandbox is for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import text_builders as build
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

_DOUBLED = (
    "{%% set n = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}"
)
_OFTEN = "{%% for i in range(99999) %%}{%% for j in range(99999) %%}%s{%% endfor %%}{%% endfor %%}"

TEMPLATES = {
    "syntax": "{% for %}",
    "unknown filter": "{{ messages | nothing }}",
    "undefined": "{{ messages[0].a.b }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format of a class": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attr": "{{ (messages | attr('__class__')).__mro__ }}",
    "changes": "{{ messages.append(1) }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops over a string": "{% set s = 'x' * 99999 %}"
    "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "nested ranges": _OFTEN % "",
    "much output": _OFTEN % ("x" * 9999),
    "plus doubling": _DOUBLED % ("'x'", "n.x + n.x"),
    "dict doubling": _DOUBLED % ("1", "dict(a=n.x, b=n.x)") + "{{ n.x | tojson }}",
    "format width": "{{ '%9999999999d' % 1 }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "expandtabs": "{{ '\t\t\t'.expandtabs(10 ** 9) }}",
    "tojson indent": "{{ [[[[[[1]]]]]] | tojson(indent=10 ** 9) }}",
    "power": "{{ 10 ** 1000000000 }}",
    "products of numbers": _DOUBLED % ("99", "n.x * n.x") + "{{ n.x % 7 }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "loop that calls itself twice": "{% for x in [[1]] recursive %}{{ loop([1]) }}{{ loop([1]) }}"
    "{% endfor %}",
    "macro without an end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "parentheses": "{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}",
    "sum": "{{ 1" + " + 1" * 200_000 + " }}",
    "nested ifs": "{% if 1 %}" * 50_000 + "{% endif %}" * 50_000,
    "30 MB": "x" * 30_000_000,
}


def template(directory: Path, source: str) -> Path:
    """Write a checkpoint with a good tokenizer and this template; return its directory."""
    return build.write_checkpoint(directory, build.byte_level(), template=source)


def _grows(directory: Path, by: int) -> None:
    tokenizer = build.byte_level()
    more = [normalizers.Replace("x", "x" * by) for _ in range(40)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("x"), *more])
    tokenizer.save(str(directory / "tokenizer.json"))


def _added(directory: Path) -> None:
    _changed(
        directory,
        lambda spec: spec["added_tokens"].extend(
            {"id": 1000 + i, "content": f"<|t{i}|>", "special": True, **_FLAGS}
            for i in range(300_000)
        ),
    )


_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _changed(directory: Path, change: Callable[[Any], object]) -> None:
    """Write a good tokenizer.json with one change."""
    spec = json.loads(build.byte_level().to_str())
    change(spec)
    (directory / "tokenizer.json").write_text(json.dumps(spec))


def _without_unknown(directory: Path, model: Any) -> None:
    Tokenizer(model).save(str(directory / "tokenizer.json"))


def _backtracks(directory: Path) -> None:
    tokenizer = build.byte_level()
    tokenizer.normalizer = normalizers.Replace("\n", "a" * 40 + "!")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a|aa)+$"), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))


def _sentencepiece(directory: Path, data: bytes) -> None:
    (directory / "tokenizer.model").write_bytes(data)


_UNKNOWN = "[UNK]"
TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "normalizer that grows": lambda d: _grows(d, 2),
    "normalizer that aborts": lambda d: _grows(d, 10_000),
    "300,000 added tokens": _added,
    "WordPiece without its unknown token": lambda d: _without_unknown(
        d, models.WordPiece({"a": 0}, unk_token=_UNKNOWN)
    ),
    "WordLevel without its unknown token": lambda d: _without_unknown(
        d, models.WordLevel({"a": 0}, unk_token=_UNKNOWN)
    ),
    "Unigram without its unknown token": lambda d: _without_unknown(
        d, models.Unigram([("a", 0.0)])
    ),
    "regular expression that backtracks": _backtracks,
    "id of 4,294,967,295": lambda d: _changed(
        d, lambda spec: spec["model"]["vocab"].update(zzz=4_294_967_295)
    ),
    "nested 100,000 deep": lambda d: (d / "tokenizer.json").write_text("[" * 100_000),
    "70 MB": lambda d: (d / "tokenizer.json").write_bytes(b'{"a": "' + b"x" * 70_000_000 + b'"}'),
    "16 MB of empty lists": lambda d: (d / "tokenizer_config.json").write_text(
        '{"a": [' + "[]," * 5_300_000 + "[]]}"
    ),
    "settings of 40 MB": lambda d: (d / "tokenizer_config.json").write_bytes(b" " * 40_000_000),
    "half a tokenizer.model": lambda d: _sentencepiece(d, build.V1_FILE.read_bytes()[:99_999]),
    "an error page": lambda d: _sentencepiece(d, b"<html>" * 999),
    "SentencePiece, pieces of 60 MB": lambda d: _sentencepiece(
        d, b"\x0a\x06\x0a\x04abcd" * 7_500_000
    ),
}


def tokenizer(directory: Path, name: str) -> Path:
    """Write a checkpoint with this tokenizer and a good template; return its directory."""
    build.write_checkpoint(directory, build.byte_level(), template=build.CHATML)
    if "SentencePiece" in name or "model" in name or "page" in name:
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
    TOKENIZERS[name](directory)
    return directory
