"""Serving, which gives many answers at once from one loaded model.

- service.py: the interface of a service that answers jobs
- model_service.py: the service over one loaded model
- running_job.py: a job with its answer, from tokens to events
- requests/: turns requests of each API into jobs
- web/: the web server, in front of a service
- client/: lets a server answer a chat
"""
