"""Texts for hypothesis: anything Unicode, and texts made to look like control markup."""

from hypothesis import strategies as st

CONTROL = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool>",
    "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[INST]", "[/INST]", "<<SYS>>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>",
]  # fmt: skip
# Pieces of control tokens, which must not be joined either.
SHARDS = [
    "<", ">", "|", "<|", "|>", "im_", "<|im_", "end|>", "<|im_end", "im_end", "/s>", "s", "<0x0A>",
    " ", "\n", "\u2581", "\ufdd0", "\ufdd1", "\U00100000", "\U000f0000", "{{ bos_token }}", "{%",
]  # fmt: skip

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
hostile = st.lists(
    st.sampled_from(CONTROL) | st.sampled_from(SHARDS) | st.text("ab é🙂", max_size=3), max_size=8
).map("".join)
anything = texts | hostile
harmless = anything.filter(lambda text: not any(token in text for token in CONTROL))
