"""The chat, as a person sees it.

- session.py: a conversation with its messages and token ids, and an answer as events
- backend.py: the interface of an engine or a server that answers
- engine_backend.py: answers with an engine
- answer.py: an answer while it is generated
- parameters.py: the parameters that can be changed in a chat, and their limits
- plain_text.py: untrusted text, checked to be text
- theme.py: the styles of everything on the screen
- printing.py: prints everything that a person sees
- terminal/: the prompt, the commands, the screen
- draw/: Markdown, code and the heatmap
- saved/: chats on disk
"""
