"""The face: a loaded model, requests to it, and the events of its answers. All front ends use it.

- load.py: loads an installed model
- model.py: the model
- model_answer.py: an answer as its events, its text or its object, for a thread or asyncio
- turn.py: the rounds of an answer that calls functions
- functions.py: functions as tools, and types as forms
- tool_results.py: the arguments and results of calls, bounded
- model_thread.py: its thread, which computes several answers at once
- arguments.py: the arguments of `Model.chat`, which become a turn
- request.py: a request and its checks, and the interface of a model here or on a server
- prompt.py: the prompt of a request, fitted into the context
- forms.py: compiles the forms that answers have to match
- running_answer.py: an answer from its prompt to its end, as text and events
- events.py: the events of an answer
- reading_time.py: the time to read a prompt
- local_models.py: the models of this machine, for `mixchat run`
- kept_caches.py: KV caches in files while a model is not loaded
"""
