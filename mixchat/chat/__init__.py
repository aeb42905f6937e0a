"""The chat, as a person sees it.

- session.py: messages and token history; an answer as events
- answer.py: an answer as it grows
- parameters.py: what of sampling and of a chat can be changed, and its limits
- plain_text.py: untrusted text, checked to be text
- printing.py: prints all that a person sees, in whole words
- terminal/: the prompt, the commands, the screen
- draw/: Markdown, code and the heatmap
- saved/: chats on disk
"""
