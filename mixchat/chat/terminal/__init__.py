"""The chat in the terminal, with the prompt, the commands and the screen.

- open_chat.py: a chat with its model and files, which asks one question or goes to the terminal
- talk.py: a chat in the terminal, from its first prompt to its end
- active_chat.py: reads a text, runs a command or asks, shows the answer, saves it
- commands.py: the commands after a slash, and the text of /help
- screen.py: shows answers and notes
- prompt.py: the prompt at which a person types
- completion.py, input_history.py, folded_paste.py, typeahead.py: its parts
- tool_permission.py: asks if a tool may run
- status_line.py: the line below it
- other_programs.py: the editor, and the clipboard's tools
"""
