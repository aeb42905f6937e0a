"""Markdown, code and the table of experts, drawn for a terminal.

- markdown.py: Markdown and code, parsed without losing text, and drawn by Rich
- markdown_stream.py: Markdown while it is being written
- expert_table.py: the use of the experts in a run
"""
