"""The chat, as a person sees it.

- session.py: messages and token history; an answer as events
- backend.py: the contract between the session and what answers
- engine_backend.py: the engine as what answers
- answer.py: an answer while it is generated
- parameters.py: the parameters that can be changed in a chat, and their limits
- plain_text.py: untrusted text, checked to be text
- theme.py: the styles of everything on the screen
- printing.py: prints everything that a person sees
- terminal/: the prompt, the commands, the screen
- draw/: Markdown, code and the heatmap
- saved/: chats on disk
"""
