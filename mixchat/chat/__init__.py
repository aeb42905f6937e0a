"""The chat, as a person sees it.

- session.py: a conversation with its messages and token ids, and an answer as events
- parameters.py: the parameters that can be changed in a chat
- named_prompts.py: prompts that a person keeps by name
- plain_text.py: untrusted text of files and web pages, checked to be text
- documents/: the text of PDFs and web pages
- printing.py: prints everything that a person sees, and its styles
- terminal/: opens a chat; the prompt, the commands, the screen
- tools/: tools of MCP servers
- draw/: Markdown, code and the table of experts
- saved/: chats on disk, and their KV caches
"""
