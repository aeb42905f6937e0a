"""Serving, which answers programs over HTTP, and files of prompts.

- serve.py: `mixchat serve` and `mixchat worker`
- installed_models.py: the installed models, as a server lists and swaps them
- answer_file.py: the files of prompts and answers of `mixchat run --jsonl`
- requests/: turns bodies into requests of the face
- web/: the web server, in front of models
- client/: lets a server answer a chat
"""
