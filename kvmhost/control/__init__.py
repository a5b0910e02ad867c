"""The control socket of a VM: HTTP and JSON on a unix socket, server and client.

Nothing is imported here, so that a VM without clients does not load the web server.
"""
