"""Text to token ids and back: tokenizers, templates, the streaming detokenizer.

- tokenizer.py: what a tokenizer promises, and which file makes one
- spm.py: tokenizer.model (SentencePiece)
- hf.py: tokenizer.json
- template.py: Mistral's instruct format, plain completion, and the choice of a template
- messages.py: what a message and a template are
- jinja_template.py, jinja_sandbox.py: a checkpoint's own chat template, and what it may call
- markup.py: knows control markup when it sees it
- detokenizer.py: ids to text as they come, never half a character
- stop.py: stop strings over a stream of text
- tokenizer_files.py: the small files beside a tokenizer
- checkpoint_text.py: a checkpoint's tokenizer and template, as all others have them
- cage.py, cage_child.py: the process in which both run, whatever they try
- frames.py, limits.py: what is said to it and back, and what it may take
"""
