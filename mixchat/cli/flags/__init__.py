"""Flags, with their checks, defaults and completion.

- settings.py: makes flags of declared options and others, and settings that config.toml gives, too
- load_flags.py: the flags that name and load a model, and the bits of its weights
- run_flags.py: the flags of mixchat run, and `ChatOptions`
- arguments.py: checked text from arguments, files and standard input
- shell_completion.py: completion of values in a shell, which Typer's scripts ask for
"""
