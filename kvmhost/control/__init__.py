"""The control socket of a VM: HTTP and JSON on a unix socket, server and client.

Nothing is imported here, so that a VM that nobody asks pays for no web server.
"""
