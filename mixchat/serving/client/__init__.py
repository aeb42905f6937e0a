"""The client of a server with OpenAI's API, for a chat that such a server answers.

- server_backend.py: a server as what answers a chat
- server_client.py: asks a server over HTTP
- patience.py: how long a server may take, and how much it may send
- server_json.py: what a server sends: models, events, errors
- server_url.py: the URL of a server
"""
