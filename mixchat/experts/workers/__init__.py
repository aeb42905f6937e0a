"""Workers: experts on other machines, from both ends of the connection to one.

Each worker has one port. libzmq encrypts what travels and lets in who knows the key. A fault stays
with its worker.

- address.py: HOST[:PORT] as a person writes it, resolved to one address
- key_file.py: the key that both ends know
- connection.py: the chat side's connection, with what both ends of it have in common
- listener.py: the worker's port, and its peers
- messages.py: what both ends say, checked on arrival
- link.py: the chat side of a worker
- session.py: the worker's side of one chat
- server.py: the worker, which serves one chat at a time
- remote_worker.py: a worker as the dispatcher sees it: it may be lost, and come back
- torchrun.py: the workers that torchrun starts beside rank 0
"""
