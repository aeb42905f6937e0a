"""Saved chats on disk.

- chat_file.py: a chat, and its JSON file
- chat_store.py: the directory of the chats, in which they are found by ID or name
- chat_saver.py: saves a chat after each turn, and resumes saved ones
- cache_saver.py: the KV cache of a chat, in a file
- chat_text.py: the table of the chats, and a chat as Markdown or JSON
"""
