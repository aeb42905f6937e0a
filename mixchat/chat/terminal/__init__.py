"""The chat in the terminal: the prompt, the commands, the screen.

- repl.py: reads a text, then obeys or asks
- active_chat.py: the chat that is open: asks, shows answers, resumes, starts anew
- commands.py, command_help.py: what can be typed after a slash, and what /help says
- screen.py: says things and shows answers
- prompt.py: the line a person types at
- completion.py, input_history.py, editor.py, typeahead.py: what it can do
- status_line.py: the line below it
- clipboard.py: where /copy puts what it takes
"""
