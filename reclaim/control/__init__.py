"""The daemon's own socket, and what it tells the system's service manager."""
