"""The openai package as the client of /v1/completions."""

import pytest


def ask(client, prompt, **options):
    return client.completions.create(model="scripted", prompt=prompt, **options)


def ids(text):
    return [ord(character) for character in text]


def test_a_whole_completion_has_openais_shape(client, served):
    answer = ask(client, "say:abc")
    assert (answer.object, answer.model) == ("text_completion", "scripted")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("abc", "stop", None)
    # The tokenizer wants BOS in front of plain text.
    assert served.requests[0].ids == [1, *ids("say:abc")]
    assert answer.usage.prompt_tokens == 8


def test_a_streamed_completion_is_the_whole_one_in_pieces(client):
    chunks = list(ask(client, "say:abc", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == "abc"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)


def test_prompts_may_be_several_and_each_has_n_answers(client):
    answer = ask(client, ["say:{seed}", "say:x"], n=2, seed=3)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "3"), (1, "4"), (2, "x"), (3, "x")]
    assert answer.usage.prompt_tokens == len("say:{seed}") + len("say:x") + 2


def test_a_seed_that_is_drawn_is_that_of_all_prompts(client):
    answer = ask(client, ["say:{seed}", "say:{seed}"])
    assert [choice.text for choice in answer.choices] == [str(answer.seed)] * 2


def test_prompts_may_be_token_ids(client, served):
    assert ask(client, ids("say:abc")).choices[0].text == "abc"
    both = ask(client, [ids("say:abc"), ids("say:d")])
    assert [choice.text for choice in both.choices] == ["abc", "d"]
    assert served.requests[0].ids == list(ids("say:abc"))


def test_log_probabilities_have_the_older_shape(client):
    (choice,) = ask(client, "say:ab", logprobs=2).choices
    assert choice.logprobs.tokens[:2] == ["a", "b"]
    assert choice.logprobs.token_logprobs[:2] == pytest.approx([-0.5, -0.5])
    assert [sorted(top) for top in choice.logprobs.top_logprobs[:2]] == [
        ["</s>", "a"],
        ["</s>", "b"],
    ]
    assert choice.logprobs.text_offset[:2] == [0, 1]
    chunks = list(ask(client, "say:abc", logprobs=0, stream=True))
    with_tokens = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs.tokens]
    assert [logprobs.text_offset for logprobs in with_tokens] == [[0], [1], [2], [3]]
