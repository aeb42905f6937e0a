"""Flags, with their checks, defaults and completion.

- settings.py: makes flags, and settings that config.toml and variables give, too
- load_flags.py: the flags of loading a model, and `LoadOptions`
- run_flags.py: the flags of mixchat run, and `ChatOptions`
- arguments.py: checked text from arguments, files and standard input
- shell_completion.py: completion of values in a shell, which Typer's scripts ask for
"""
