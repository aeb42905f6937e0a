"""The chat in the terminal: the prompt, the commands, the screen.

- repl.py: reads a text, then runs a command or asks
- active_chat.py: the chat that is open: asks, answers, resumes a chat, starts a new one
- commands.py, command_help.py: the commands after a slash, and the text of /help
- screen.py: shows answers and notes
- prompt.py: the line where a person types
- completion.py, input_history.py, editor.py, typeahead.py: its parts
- status_line.py: the line below it
- reading_time.py: how long a prompt will take to be read
- clipboard.py: copies text for /copy
"""
