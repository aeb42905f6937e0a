"""The web server, which answers programs with a model.

- access.py: the address that it listens on, and the requests that it turns away
- server.py: uvicorn in a thread, from the first request to an orderly end
- request_log.py: a line for each request, of `serve --log-requests`
- acceptor.py: accepts connections, no more than there are descriptors for
- app.py: the routes
- bodies.py: the memory of requests, their bodies and untaken answers, in one budget
- served_models.py: the loaded model, its sleep, and the change to another one
- page.py: the page at `/`, a chat in the browser, with its files in page_files/
- answers.py: the answers to one request while they are computed, whole or as a stream
- responses.py: the form of a response, the objects of OpenAI's chats, and counts for Prometheus
- blocks.py: an answer as blocks of thinking, text and calls, for APIs that send such blocks
- openai_responses.py, anthropic.py, ollama.py: other APIs, their bodies and responses
"""
