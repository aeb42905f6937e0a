"""Chat with a mixture-of-experts model that is larger than the machine's fast memory.

- errors.py: the tree of errors, each with its exit code and hint
- model_config.py: a model's shape, with config.json's own keys
- context.py: how many tokens a context holds, and which texts are too long for it
- settings.py: the places of mixchat's files, and what config.toml says
- quantities.py: sizes, rates and times written; an amount of memory read
- safetensors.py: the file format of weights
- files.py: small files, read with clear errors, written whole or not at all
- output_file.py: files that a person names for output, never another's overwritten
- lock.py: one process at a time for each model, and for the chats
- machine.py: memory and disk that are free
- cgroups.py: limits of memory and CPU time, of control groups
- background.py: work in a thread
- interrupts.py: when Ctrl-C, SIGTERM and SIGHUP are acted on
- progress.py: how long work says how far it is
- sanitize.py: no control character reaches the terminal
"""

__version__ = "0.1.0"
