"""Text to token ids and back: tokenizers, chat templates, the streaming detokenizer.

- tokenizer.py: the interface of a tokenizer
- spm.py: tokenizer.model (SentencePiece)
- hf.py, hf_bytes.py: tokenizer.json, and the bytes of its tokens
- messages.py: a conversation as a list of messages
- template.py: the interface of a chat template
- builtin_templates.py: Mistral's instruct format, and plain completion
- jinja_template.py, jinja_environment.py: a checkpoint's own chat template, and what it may call
- choose.py: the tokenizer and the template that fit a checkpoint
- tokenizer_files.py: the small files beside a tokenizer
- markup.py: control markup in tokens, texts and templates
- checkpoint_text.py: a checkpoint's tokenizer and template, run in a sandbox
- sandbox.py, sandbox_child.py: the process in which both run: its parent's side, and its own
- sandbox_limits.py: the memory, time and file sizes that they may use
- frames.py: JSON messages to that process and back
- detokenizer.py: text from ids, one at a time, never half a character
- stop.py: stop strings in a stream of text
- form/: answers of a given form: JSON by a schema, or text by a grammar
"""
