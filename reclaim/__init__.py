"""Page reclaim for VMs: who is cold, how much has to go, and the daemon that asks for it.

Talks to VMs over their control sockets and owns no guest data.
"""
