"""Flags: their values, checks, defaults and completion.

- config_flag.py: a flag that config.toml and a variable can give, too
- config_defaults.py: what config.toml says, as defaults for flags
- model_flags.py: the flags of sampling and loading
- chat_flags.py: the flags of a chat and of what is printed
- checks.py: what their values have to keep
- arguments.py: the prompt, out of the argument and standard input
- shell_completion.py: what a shell completes
"""
