"""Serving: many answers at once from one loaded model, over HTTP or from a file of prompts.

- service.py: the contract between those who ask and the service that answers
- model_service.py: the service over one loaded model
- running_job.py: a job with its answer, from tokens to events
- web/: the web server, in front of a service
- server_backend.py: a server as what answers a chat
- client.py: asks a server over HTTP
- completion.py: what a server sends, in JSON
- event_stream.py: server-sent events
- server_url.py: the URL of a server
"""
