"""Workers: experts on other machines, from both ends of the connection to one.

Each worker and the chat side have a connection that carries small messages, and a group of two
members in torch.distributed that carries rows of hidden states. A fault stays with its worker.

- address.py: HOST[:PORT] as a person writes it, resolved to one address
- key_file.py: the key that both ends know
- connection.py: frames over TCP, with deadlines
- handshake.py: both ends prove that they know the key
- messages.py: the frames' contents, checked on arrival
- group.py: the group of two members, bound to its connection
- link.py: the chat side of a worker
- session.py: the worker's side of one chat
- door.py: the worker's listener, which keeps strangers out
- remote_worker.py: a worker as the dispatcher sees it: it may be lost, and come back
- server.py: the worker, which serves one chat at a time
- torchrun.py: the workers that torchrun starts beside rank 0
"""
