"""Between text and token ids: tokenizers, templates, the streaming detokenizer."""
