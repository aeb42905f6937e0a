"""Text to token ids and back: tokenizers, chat templates, the streaming detokenizer.

- tokenizer.py: the interface of a tokenizer, and the rules for control tokens
- spm.py: tokenizer.model (SentencePiece)
- hf.py: tokenizer.json, and the bytes of its tokens
- tokenizer_files.py: the small files next to a tokenizer
- messages.py: a conversation as a list of messages
- template.py: the interface of a chat template, Mistral's instruct format, plain completion
- jinja_template.py: a checkpoint's own chat template
- choose.py: the tokenizer and the template that fit a checkpoint
- checkpoint_text.py: a checkpoint's tokenizer and template, run in a sandbox
- sandbox.py, sandbox_child.py: the process in which both run, from its parent's side and its own
- sandbox_protocol.py: their messages, and the memory limit
- thinking.py: takes a model's thinking apart from its answer
- tool_call.py: a tool, a call, and a piece of a call
- tool_formats.py: the forms in which models call tools, and one for models that learned none
- literals.py: values as literals of Python's or Gemma's form, and as JSON
- tool_parser.py: takes calls out of an answer while it is generated
- detokenizer.py: the bytes of tokens, and text from one id after the other, up to a stop string
- form/: holds answers to a JSON schema or a grammar
"""
