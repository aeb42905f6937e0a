"""Markdown, code and the heatmap, drawn for a terminal.

- markdown.py, markdown_rules.py: Markdown and code, drawn by Rich
- markdown_stream.py: Markdown while it is being written
- heatmap.py: the use of the experts in a run
"""
