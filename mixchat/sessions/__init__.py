"""Opens chats, services and workers. No other room joins chat, serving and loading.

- provider.py: the interface of the models of a machine or server
- local_models.py: the models of this machine
- server_models.py: the models of a server, and a look for a server on this machine
- opening.py: loads a model for a chat or for a service
- open_chat.py: opens a chat or asks one question, saves it, and changes its model
- install.py: checks the text of a checkpoint, and calibrates a model
- cache_file.py: the KV caches of chats and of a server, in files
- answer_lines.py: a file of prompts, and the file of answers
- servers.py: serves a model over HTTP, or experts to other machines
"""
