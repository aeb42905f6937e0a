"""Workers: experts on other machines, from both ends of the connection.

- address.py: HOST[:PORT] as a person writes it, resolved to one address
- key_file.py: the key that both ends know
- sockets.py: libzmq's sockets, their keys and limits, for both ends
- messages.py: the messages of both ends, checked on arrival
- link.py: the chat side of a worker
- remote_worker.py: a worker as the dispatcher sees it, which may be lost and come back
- listener.py: the worker's port, and its peers
- server.py: the worker, which serves one chat at a time
"""
