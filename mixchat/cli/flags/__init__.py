"""Flags: their values, checks, defaults and completion.

- config_flag.py: settings: flags that config.toml and variables give, too
- config_defaults.py: config.toml as defaults for flags
- model_flags.py: the flags of sampling and loading
- chat_flags.py: the flags of a chat and of its output
- checks.py: checks for their values
- habits.py: answers to flags and commands of other programs, and to misspelled ones
- quantization.py: the bits of weights, and calibration
- arguments.py: checked text: arguments, files, standard input; the prompt
- shell_completion.py: completion in a shell
"""
