"""Bodies, checked field by field and turned into the face's requests.

- fields.py: JSON from bytes, and checked values from a JSON object
- shared.py: what bodies of all APIs have, and the request that they become
- tool_fields.py: the tools that a body offers, calls and their results
- openai.py: OpenAI's completions, and what they and chats have
- chat.py: OpenAI's chats
- lines.py: a file of prompts, a JSON object a line
- errors.py: errors in the form of OpenAI
"""
