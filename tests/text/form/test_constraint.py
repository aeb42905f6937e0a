"""Constraints: what they allow is the text that a person sees, and an answer ends by itself."""

import pytest
import torch
from form_walks import STOP, ByteTokenizer, compiled, lark_grammar

from mixchat.base.errors import PromptError, UsageError
from mixchat.text.detokenizer import Detokenizer, TokenBytes
from mixchat.text.form.constraint import ConstraintCompiler, TokenConstraint


def allowed(constraint: TokenConstraint) -> set[int]:
    return set(constraint.allowed().nonzero().flatten().tolist())


def test_once_the_form_is_complete_only_tokens_that_end_the_answer_are_allowed():
    tokenizer = ByteTokenizer(b"ab", b"")
    form = ConstraintCompiler(tokenizer, {STOP, 258}).compile(lark_grammar('start: "ab"'))  # type: ignore[arg-type]
    constraint = form()
    assert allowed(constraint) == {ord("a"), 257}
    constraint.accept(257)
    assert allowed(constraint) == {STOP, 258}
    constraint.accept(258)


def test_an_answer_may_end_or_continue_if_the_form_allows_both():
    constraint = compiled(lark_grammar("start: /a+/"))()
    assert allowed(constraint) == {ord("a")}
    constraint.accept(ord("a"))
    assert allowed(constraint) == {ord("a"), STOP}


def test_the_first_token_counts_as_it_is_shown():
    """SentencePiece shows `▁yes` at the start as `yes`, and after other text with its space."""
    tokenizer = ByteTokenizer(b" yes", b" ", first={257: b"yes", 258: b""})
    form = compiled(lark_grammar('start: "yes" " yes"?'), tokenizer)
    constraint = form()
    assert allowed(constraint) == {ord("y"), 257}
    constraint.accept(257)
    assert allowed(constraint) == {ord(" "), 257, 258, STOP}


def test_the_first_token_keeps_its_space_if_it_continues_a_prompt():
    tokenizer = ByteTokenizer(b" yes", first={257: b"yes"})
    form = compiled(lark_grammar('start: " yes" | "no"'), tokenizer)
    assert allowed(form(continued=True)) == {ord(" "), 257, ord("n")}
    assert allowed(form()) == {ord(" "), ord("n")}


def test_an_answer_is_continued_from_its_end():
    form = compiled(lark_grammar('start: "abc"'))
    assert allowed(form([ord("a"), ord("b")])) == {ord("c")}


def test_an_answer_of_another_form_cannot_be_continued():
    with pytest.raises(PromptError, match="does not have the form"):
        compiled(lark_grammar('start: "abc"'))([ord("a"), ord("x")]).allowed()


def test_a_vocabulary_that_lacks_a_character_is_named_as_the_reason():
    class Few:
        token_bytes = TokenBytes([b"a", b"", b"b"], {})

    form = ConstraintCompiler(Few(), {1}).compile(lark_grammar("start: /a/ /z/"))  # type: ignore[arg-type]
    constraint = form()
    constraint.accept(0)
    with pytest.raises(UsageError, match="no token for what has to come"):
        constraint.allowed()


@pytest.mark.parametrize("stops", [set(), {1000}])
def test_a_model_without_a_token_that_ends_answers_is_refused(stops):
    with pytest.raises(UsageError, match="no token that ends an answer"):
        ConstraintCompiler(ByteTokenizer(), stops)  # type: ignore[arg-type]


def test_control_tokens_are_never_allowed_as_text(tokenizer):
    stop = tokenizer.eos_id or tokenizer.control_tokens.get("<|im_end|>")
    form = ConstraintCompiler(tokenizer, {stop}).compile(lark_grammar("start: /(.|\\n)*/"))
    controls = set(tokenizer.control_tokens.values())
    assert allowed(form()) & controls == {stop}


def test_what_is_shown_of_random_answers_has_the_form(tokenizer, kind):
    """For each kind of tokenizer, at the start of a text and after a prompt."""
    pattern = r"(é|€|🙂| a|  |\n|[a-z,.])" if kind != "unigram" else "( |[a-e])"
    stop = tokenizer.eos_id or tokenizer.control_tokens.get("<|im_end|>")
    constraint = lark_grammar(f"start: /{pattern}{{1,30}}/")
    form = ConstraintCompiler(tokenizer, {stop}).compile(constraint)
    for before in ([], tokenizer.encode("Once upon")):
        answer, ids = form(continued=bool(before)), list[int]()
        generator = torch.Generator().manual_seed(1)
        while True:
            weights = answer.allowed().float()
            token = int(torch.multinomial(weights, 1, generator=generator))
            answer.accept(token)
            if token == stop:
                break
            ids.append(token)
        detokenizer = Detokenizer(tokenizer.token_bytes, before)
        text = "".join(map(detokenizer.add, ids)) + detokenizer.flush()
        assert compiled(constraint)(text.encode()).allowed()[STOP], text
