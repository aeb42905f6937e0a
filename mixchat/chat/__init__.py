"""The chat, as a person sees it: the session, the terminal, Markdown, saved chats.

- session.py: messages and token history; an answer as events
- answer.py: an answer as it grows
- repl.py: the chat in the terminal: reads, obeys, answers
- commands.py, command_help.py: what can be typed after a slash, and what /help says
- parameters.py: what of sampling and of a chat can be changed, and its limits
- screen.py: says things and shows answers
- markdown.py, markdown_rules.py, highlight.py: Markdown and code, drawn
- markdown_stream.py: the same while it is being written
- prompt.py: the line a person types at
- completion.py, input_history.py, editor.py, typeahead.py: what it can do
- status.py: the line below it
- plain_text.py: untrusted text, checked to be text
- clipboard.py, code.py: what /copy takes, and where it puts it
- keeper.py: saves a chat after each turn, and brings saved ones back
- chats.py, chat_file.py, chat_table.py: the saved chats, their files, their list
- export.py: a chat for others to read
- heatmap.py: the experts of a run, drawn
- printing.py: prints all that a person sees, in whole words
- sanitize.py: no control character reaches the terminal
"""
