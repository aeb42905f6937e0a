"""The chat in the terminal, with the prompt, the commands and the screen.

- open_chat.py: opens a chat or asks one question, saves it, and changes its model
- loading.py: loads the model behind the prompt
- active_chat.py: reads a text, runs a command or asks, shows the answer, saves it
- commands.py: the commands after a slash, and the text of /help
- screen.py: shows answers and notes
- prompt.py: the prompt at which a person types
- completion.py, input_history.py, typeahead.py: its parts
- status_line.py: the line below it
- other_programs.py: the editor, and the clipboard's tools
"""
