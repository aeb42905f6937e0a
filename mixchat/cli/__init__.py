"""The command line, as a shell sees it: the Typer app, and a file for each command.

- app.py: the commands, and the one place where an error becomes an exit code
- run.py: mixchat run: a chat, or one answer
- download.py: mixchat download
- models.py: mixchat list, mixchat show
- upkeep.py: mixchat verify, repair, convert, rm, gc
- answer.py: one answer: on a terminal, for a pipe, as JSON
- chat.py: begins a chat
- chats.py: mixchat chats: lists, prints and removes saved ones
- opening.py: from a name and flags to a session that can be asked
- plan.py, plan_text.py: mixchat plan
- stats.py, reports.py: mixchat stats, and the report that run leaves for it
- simulate.py: mixchat simulate
- bench.py, bench_text.py: mixchat bench
- png.py: pictures, where matplotlib is installed
- config.py: mixchat config
- defaults.py: what config.toml says, as defaults for flags
- setting.py: a flag that config.toml and a variable can give, too
- options.py: the flags of sampling and loading
- chat_options.py: the flags of a chat and of what is printed
- limits.py: what their values have to keep
- completion.py: what a shell completes
- prompt_cache.py: the file of --prompt-cache: looked at before, written at the end
- arguments.py: the prompt, out of the argument and standard input
- progress.py, bars.py: bars on a terminal of any width, lines elsewhere
- report.py: an error as lines for a person
- verbose.py: what --verbose prints
"""
