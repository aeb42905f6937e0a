"""The context: how large it can be, and what helps where a prompt is too long for it."""

import pytest

from mixchat.base.context import Context


@pytest.mark.parametrize(
    ("context", "tokens", "hint"),
    [
        (Context(4096, 32768), 5000, "--ctx-size can be up to 32768."),
        (Context(4096, 32768), 32768, "Shorten it: this model reads 32767 tokens at most."),
        (Context(8192, 8192), 9000, "Shorten it: this model reads 8191 tokens at most."),
    ],
)
def test_a_larger_context_is_only_offered_where_it_would_be_large_enough(context, tokens, hint):
    """For a prompt longer than the largest context, the hint advised a larger --ctx-size."""
    error = context.prompt_too_long(tokens)
    assert str(error).startswith(f"the prompt is too long: {tokens} tokens, the context holds")
    assert error.hint == hint
