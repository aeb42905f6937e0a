import pytest

from mixchat.base.context import Context


@pytest.mark.parametrize(
    ("context", "tokens", "hint"),
    [
        (Context(8192, 32768), 12030, "Shorten it, or use --ctx-size 16384."),
        (Context(8192, 32768), 16000, "Shorten it, or use --ctx-size 32768."),
        (Context(8192, 20000), 16000, "Shorten it, or use --ctx-size 20000."),
        (Context(4096, 32768), 32768, "Shorten it: this model reads 32,767 tokens at most."),
        (Context(8192, 8192), 9000, "Shorten it: this model reads 8,191 tokens at most."),
    ],
)
def test_a_larger_context_is_only_offered_where_it_would_be_large_enough(context, tokens, hint):
    """For a prompt longer than the largest context, the hint advised a larger --ctx-size."""
    error = context.prompt_too_long(tokens)
    assert f"{tokens:,} tokens, but the context holds {context.tokens:,}" in str(error)
    assert error.hint == hint
