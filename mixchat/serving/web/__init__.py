"""The web server: OpenAI's routes over HTTP, in front of a `Service`.

- listener.py: the socket that it listens on
- server.py: uvicorn in a thread, from the first request to an orderly end
- connections.py: uvicorn's connection, with an end to its patience
- app.py: the routes
- guard.py: turns away strangers: foreign hosts, foreign origins, wrong keys
- body.py: JSON from the bytes of a body
- fields.py: checked values from a JSON object
- options.py: the fields that chat and completion share
- chat.py: the body of a chat, turned into jobs
- completion.py: the body of a completion, turned into jobs
- response_format.py: the form that an answer has to have
- served_forms.py: compiles forms for the model that is served
- answers.py: the jobs of one request while they run
- shapes.py: answers in the shapes of OpenAI
- logprobs.py: log probabilities in the shapes of OpenAI
- lines.py: a file of prompts, a JSON object a line
- stream.py: an answer piece by piece, as server-sent events
- metrics.py: counts for Prometheus
- failures.py: errors in the form of OpenAI
"""
