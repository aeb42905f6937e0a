"""Markdown, code and the heatmap, drawn for a terminal.

- markdown.py: Markdown and code, parsed without losing text, and drawn by Rich
- markdown_stream.py: Markdown while it is being written
- heatmap.py: the use of the experts in a run
"""
