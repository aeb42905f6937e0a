"""Tools of MCP servers, which a model may call in a chat.

- server_file.py: reads the file that names the servers
- stdio.py: a server as a process, whose lines and end are bounded
- http.py: the client of servers over HTTP, whose answers are bounded
- mcp_servers.py: the servers in one thread, their tools and calls of them
- toolbox.py: asks before a tool runs, and bounds its result
"""
