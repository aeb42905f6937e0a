"""Saved chats on disk.

- chats.py, chat_file.py, chat_table.py: the saved chats, their files, their list
- keeper.py: saves a chat after each turn, and brings saved ones back
- export.py: a chat for others to read
"""
