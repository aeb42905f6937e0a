"""Saved chats on disk.

- saved_chat.py: a chat, its summary, and its name
- chat_store.py: the database of the chats, in which they are found by ID, name or text
- chat_saver.py: saves a chat after each turn, and resumes saved ones
- cache_saver.py: the KV cache of a chat, in a file
- chat_text.py: the table of the chats, and a chat as Markdown or JSON
"""
