"""The client of mixchat's server: a model of a server answers as one of this machine does.

- server_models.py: the models of a server, and a look for a server on this machine
- server_model.py: a model of a server, and its answer
- server_client.py: asks a server over HTTP
- patience.py: how long a server may take, and how much it may send
- server_json.py: what a server sends: models, events, errors
- server_url.py: the URL of a server
"""
