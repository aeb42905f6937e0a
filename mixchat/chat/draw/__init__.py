"""Markdown, code and the heatmap, drawn for a terminal.

- markdown.py, markdown_rules.py, highlight.py: Markdown and code
- markdown_stream.py: the same while it is being written
- code.py: the code in an answer
- heatmap.py: the experts of a run
"""
