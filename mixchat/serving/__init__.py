"""Serving, which gives many answers at once from one loaded model.

- service.py: the contract between those who ask and the service that answers
- model_service.py: the service over one loaded model
- running_job.py: a job with its answer, from tokens to events
- requests/: what a request asks for, turned into jobs
- web/: the web server, in front of a service
- client/: a server, here or elsewhere, as what answers a chat
"""
