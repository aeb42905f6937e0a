"""Saved chats on disk.

- chat_store.py, chat_file.py, chat_table.py: the saved chats, their files, their list
- chat_saver.py: saves a chat after each turn, and resumes saved ones
- export.py: a chat as Markdown or JSON
"""
