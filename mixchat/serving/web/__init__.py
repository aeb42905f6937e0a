"""The web server: OpenAI's routes over HTTP, in front of a `Service`.

- listener.py: the socket that it listens on
- server.py: uvicorn in a thread, from the first request to an orderly end
- connections.py: uvicorn's connection, with an end to its patience
- app.py: the routes
- guard.py: turns away strangers: foreign hosts, foreign origins, wrong keys
- answers.py: the jobs of one request while they run
- shapes.py: answers in the shapes of OpenAI
- logprobs.py: log probabilities in the shapes of OpenAI
- stream.py: an answer piece by piece, as server-sent events
- metrics.py: counts for Prometheus
"""
