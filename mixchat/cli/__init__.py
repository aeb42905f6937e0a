"""The command line. Commands parse flags, call and print.

- app.py: the list of commands, and the exit codes of errors
- run.py: mixchat run
- serve.py: mixchat serve, worker
- download.py: mixchat download, calibrate
- models.py: mixchat list, show, verify, repair, rm, gc, stats
- plan.py: mixchat plan
- bench.py: mixchat bench
- chats.py: mixchat chats
- config.py: mixchat config
- flags/: flags, their checks, their defaults, their completion, and the options that they give
- output/: the text, JSON, progress and errors that commands print
"""
