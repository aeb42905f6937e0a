"""The command line: the Typer app, and a file for each command.

- app.py: the commands, and the one place that turns an error into an exit code
- run.py: mixchat run: a chat, or one answer
- start_chat.py: starts or resumes a chat
- model_provider.py: the contract of the place whose models answer: this machine, or a server
- local_models.py: the models of this machine, as run uses them
- opening.py: opens a chat session or a service from a model's name and options
- server_chat.py: opens a chat with a server's model
- change_model.py: changes the model of a chat
- cache_file.py: the KV cache in a file, that of --prompt-cache or that beside a chat
- download.py: mixchat download
- models.py: mixchat list, mixchat show
- calibrate.py: mixchat calibrate
- upkeep.py: mixchat verify, repair, convert, rm, gc
- chats.py: mixchat chats: lists, prints and removes saved ones
- worker.py: mixchat worker
- serve.py: mixchat serve
- jsonl.py: mixchat run --jsonl: the file of prompts and the file of answers
- plan.py: mixchat plan
- stats.py: mixchat stats
- bench.py: mixchat bench
- config.py: mixchat config
- flags/: flags, their checks, their defaults, their completion
- output/: the text, JSON, progress and errors that commands print
"""
