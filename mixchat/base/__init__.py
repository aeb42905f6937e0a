"""Errors, options, files and facts of this machine, which every room uses.

- errors.py: the tree of errors, each with its exit code and hint
- model_config.py: the shape of a model, with the keys of config.json
- context.py: the tokens that a prompt and its answer may have together
- rope_parameters.py: the rotary position embedding of a model's layers
- settings.py: the directories of mixchat's files, and the settings in config.toml
- quantities.py: sizes, rates and times as text, and amounts of memory from text
- option.py: the declaration of an option: its flag, its help, and the values that it takes
- options.py: the options of sampling, of a chat and of loading a model, and a worker's address
- safetensors.py: the file format of weights
- system.py: all that differs between Linux and macOS, and the modes of a terminal
- files.py: mixchat's own files, read with clear errors, written whole or not at all
- output_file.py: files that a person names for output, never overwriting another file
- lock.py: locks between processes, for files that only one may write
- machine.py: this machine's processor, memory and disk
- gpu.py: the GPUs that torch sees, their memory, streams and waits
- held_files.py: files of the system that can be read without a free descriptor
- cgroups.py: the limits of memory and CPU time that control groups set
- interrupts.py: the moment at which Ctrl-C, SIGTERM and SIGHUP take effect
- http.py: HTTP connections whose answers are limited in bytes and seconds
- progress.py: the progress of long work, and work in a background thread
- sanitize.py: removes control characters before the terminal gets a text
"""
