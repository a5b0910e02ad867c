"""The daemon's control socket: server, client, metrics, and lru_gen commands."""
