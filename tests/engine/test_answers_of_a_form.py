"""Answers of a given form by models whose random weights would never give one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_tools
import pytest
import torch
from jsonschema import Draft202012Validator
from tiny_tokenizer import write_tokenizer

from mixchat.base.errors import UsageError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.generate import Engine
from mixchat.engine.speculation import Speculation
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import load_engine
from mixchat.text.choose import load_tokenizer
from mixchat.text.form.constraint import ConstraintCompiler, StartConstraint
from mixchat.text.form.output_constraint import OutputConstraint

sys.path.insert(0, str(Path(__file__).parent.parent / "text/form"))
from form_walks import json_object, json_schema, lark_grammar
from schema_maker import SchemaMaker

STOP = 2  # <|im_end|>
PROMPT = [1, 72, 105]
ORDER = {
    "type": "object",
    "properties": {
        "item": {"enum": ["tea", "milk"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["item", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """A random model of 262 tokens, one for each byte among them, and its tokenizer."""
    checkpoint = make_checkpoint(
        vocab_size=262, max_position_embeddings=1024, intermediate_size=128
    )
    return install(write_tokenizer(checkpoint))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load_engine(model, LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def compiled(tokenizer: Any) -> Callable[[OutputConstraint], StartConstraint]:
    return ConstraintCompiler(tokenizer, {STOP}).compile


def answer(
    engine: Engine,
    form: StartConstraint | None,
    seed: int,
    most: int = 400,
    *,
    ends: bool = False,
    **options: Any,
) -> list[int]:
    """Return an answer's tokens. ends: the form knows the limit."""
    sampling = SamplingOptions(seed=seed, **{"temperature": 1.0, **options})
    constraint = None if form is None else form(room=most if ends else None)
    given = {"stop_ids": {STOP}, "max_tokens": most, "constraint": constraint}
    return engine_tools.answer(engine, PROMPT, sampling, **given)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}])
def test_an_answer_is_json_by_the_schema_whatever_the_sampling(
    engine, tokenizer, compiled, options
):
    *ids, last = answer(engine, compiled(json_schema(ORDER)), seed=1, **options)
    assert last == STOP
    Draft202012Validator(ORDER).validate(json.loads(tokenizer.decode(ids)))


def test_an_answer_that_is_cut_off_is_the_beginning_of_a_whole_one(engine, compiled):
    form = compiled(json_schema(ORDER))
    whole = answer(engine, form, seed=1)
    assert answer(engine, form, seed=1, most=7) == whole[:7]


def test_every_finished_answer_to_generated_schemas_is_valid(engine, tokenizer, compiled):
    finished = 0
    for seed in range(20):
        schema = SchemaMaker(seed).schema()
        *ids, last = answer(engine, compiled(json_schema(schema)), seed)
        if last == STOP:
            finished += 1
            Draft202012Validator(schema).validate(json.loads(tokenizer.decode(ids)))
    assert finished >= 18


def without_limits(schema: Any) -> Any:
    """Return a schema whose texts, lists and patterns may have any length."""
    if isinstance(schema, list):
        return [without_limits(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    limits = {"maxLength", "maxItems", "maxProperties"}
    return {key: without_limits(part) for key, part in schema.items() if key not in limits}


def test_an_answer_of_any_length_is_whole_at_its_limit(engine, tokenizer, compiled):
    """A random model never closes a text, and 3 of 6 answers of a small one were cut off."""
    at_limit = 0
    for seed in range(30):
        schema = without_limits(SchemaMaker(seed).schema())
        definitions = schema.pop("$defs", {})
        whole = {"$defs": definitions, "type": "array", "items": schema, "minItems": 1}
        most = 40 + 9 * seed
        *ids, last = answer(engine, compiled(json_schema(whole)), seed, most, ends=True)
        assert last == STOP, seed
        Draft202012Validator(whole).validate(json.loads(tokenizer.decode(ids)))
        at_limit += len(ids) + 1 > most - 8
    assert at_limit >= 5


@pytest.mark.parametrize("most", [1, 5, 12, 30])
def test_a_limit_that_no_answer_fits_in_changes_nothing(engine, compiled, most):
    form = compiled(json_schema({"type": "array", "items": ORDER, "minItems": 2}))
    assert answer(engine, form, 1, most, ends=True) == answer(engine, form, 1, most)


def test_an_answer_that_ends_in_time_is_not_changed(engine, compiled):
    form = compiled(json_schema(ORDER))
    whole = answer(engine, form, 1)
    assert answer(engine, form, 1, len(whole), ends=True) == whole


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")
@pytest.mark.parametrize(
    "form",
    [
        json_schema({"type": "array", "items": ORDER, "minItems": 8, "maxItems": 8}),
        lark_grammar('start: ("the same line again\\n" | "another line\\n"){12}'),
        json_object(),
    ],
    ids=["schema", "grammar", "object"],
)
def test_an_answer_is_the_same_with_speculation(model, compiled, form, monkeypatch):
    monkeypatch.setattr(Speculation, "pays", property(lambda self: True))
    engines = [
        load_engine(model, LoadOptions(device="cpu", speculation=how)) for how in (True, False)
    ]
    with_it, without = (answer(engine, compiled(form), 3) for engine in engines)
    assert with_it == without
    if form != json_object():  # which repeats nothing
        assert engines[0].stats.speculation.accepted > 0


def prompt(seed: int, constraint: Any) -> TokenAnswer:
    sampling = SamplingOptions(temperature=1.0, seed=seed)
    return TokenAnswer([*PROMPT, seed], sampling, frozenset({STOP}), 60, constraint)


def answered(engine: Engine, *prompts: TokenAnswer) -> list[tuple[list[int], Exception | None]]:
    """Answer prompts at once; return the tokens of each, and why it failed."""
    batch = engine.new_batch()
    answers = [batch.add(prompt) for prompt in prompts]
    while batch.size:
        batch.step()
    return [(answer.ids[answer.stats.prompt_tokens :], answer.error) for answer in answers]


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")
def test_answers_of_several_forms_at_once_are_those_that_each_gets_alone(model, compiled):
    engine = load_engine(model, LoadOptions(device="cpu", exact_prompts=True, parallel=4))
    forms = [compiled(json_schema(ORDER)), compiled(json_object()), None]

    def prompts() -> list[TokenAnswer]:
        return [prompt(n + 20, form and form()) for n, form in enumerate([*forms, forms[0]])]

    together = answered(engine, *prompts())
    assert together == [answered(engine, one)[0] for one in prompts()]
    assert [error for _, error in together] == [None] * 4
    assert together[0][0][-1] == together[3][0][-1] == STOP


class DeadEnd:
    """Allows one token, and none after it."""

    def __init__(self) -> None:
        self.taken = 0

    def allowed(self) -> torch.Tensor:
        if self.taken:
            raise UsageError("nothing can come next")
        return torch.arange(262) == 50

    def accept(self, token: int) -> bool:
        self.taken += 1
        return True


def test_a_form_without_a_way_on_ends_only_its_own_answer(model, compiled):
    engine = load_engine(model, LoadOptions(device="cpu", exact_prompts=True, parallel=2))
    other = compiled(json_schema(ORDER))
    (ids, error), whole = answered(engine, prompt(1, DeadEnd()), prompt(2, other()))
    assert (ids, str(error)) == ([50], "nothing can come next")
    assert (whole[0][-1], whole[1]) == (STOP, None)
