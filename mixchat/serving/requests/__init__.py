"""Requests, checked field by field and turned into jobs.

- body.py: JSON from bytes
- fields.py: checked values from a JSON object
- options.py: the fields that chat and completion share, and the model that answers
- chat.py: the body of a chat, with the fields that control a model's thinking
- chat_job.py: a chat, whichever API asks for it, turned into a job
- tools.py: the tools that a request offers, and calls in its conversation
- completion.py: a completion, turned into jobs
- forms.py: the form that an answer has to have
- lines.py: a file of prompts, a JSON object a line
- errors.py: errors in the form of OpenAI
"""
